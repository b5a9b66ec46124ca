// Keeps the library running on older systems than the one that compiles it: here is the code that
// it would otherwise need from glibc 2.32 and from the libstdc++ of GCC 9 and 11. cmake/exports.map
// keeps all of it to the library. torch 2.11 needs glibc 2.28, where none of it is.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
// std::shared_ptr counts without atomics while this is true; false is always safe.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// torch's headers make their messages with these two, whose default constructors came with GCC 9.
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

// std::allocator refuses too many elements by this function, which came with GCC 11. It is here by
// its name in the library, as older compilers' headers do not declare it.
extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void
_ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}
#endif
