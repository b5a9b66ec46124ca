"""An emulated GPU of NVIDIA's: it runs the PTX that Triton has compiled, and looks for races.

Triton's interpreter runs a kernel's source, one program at a time and with all of its threads in
step. What only a GPU would show is in the compiled kernel: which thread loads what, copies that
are under way, barriers, matrix instructions and their layouts in shared memory, descriptors. Here
that code itself runs, on a CPU and above Triton's own launcher (``driver``), and memory is watched
(``memory``): an access beyond a tensor, one that is not aligned, and what two warps or two programs
do to the same place without a barrier between them raise an error with the line of the source.

Not emulated is what the assembler makes of PTX, and time. Copies arrive as late as they may.

What the instructions do is from NVIDIA's "Parallel Thread Execution ISA"; the layouts of matrices
that asynchronous instructions read from shared memory are told in ``matrices``.
"""
