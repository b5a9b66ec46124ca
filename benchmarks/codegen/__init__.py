"""Compiles the Triton kernels ahead of time and reads what came out; needs no GPU.

- ``targets``: the architectures' limits, and the rates of one GPU of each
- ``cases``: which launches are compiled; all that is known of how the package builds them
- ``frame_cases``: likewise of attention over frames of tokens
- ``compile``: launch → binary, as the JIT would
- ``binary``: binary → registers, spills, shared memory, loads, stores, matrix instructions
- ``report``: what no shipped configuration may do, the predicted use of the memory's bandwidth, and
  the tables of both
"""
