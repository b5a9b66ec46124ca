"""Compiles the Triton kernels ahead of time and reads what came out; needs no GPU.

- ``targets``: the architectures' limits, and the rates of one GPU of each
- ``cases``: which launches are compiled; all that is known of how the package builds them
- ``compile``: launch → binary, as the JIT would
- ``binary``: binary → registers, spills, shared memory, loads, stores, matrix instructions
- ``model``: what no shipped configuration may do, and the predicted use of the memory's bandwidth
- ``report``: the results of a case, and the tables
"""
