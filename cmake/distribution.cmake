# What lets the library run on machines other than the one that built it. tools/check_wheel.py checks
# all of it.

# Messages name files as they lie in the source tree and in torch, not on this machine.
target_compile_options(
  vstar_kernels PRIVATE "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=" "-ffile-prefix-map=${TORCH_DIR}/=")

if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_sources(vstar_kernels PRIVATE bindings/compatibility.cpp)
  # libstdc++ stays shared: exceptions pass from here to torch, which a second copy of its runtime
  # would not survive in all cases, and a static copy would need the glibc it was built with.
  set(exports "${CMAKE_SOURCE_DIR}/cmake/exports.map")
  target_link_options(vstar_kernels PRIVATE "LINKER:--version-script=${exports}")
  set_target_properties(vstar_kernels PROPERTIES LINK_DEPENDS "${exports}")
endif()
