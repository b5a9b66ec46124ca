"""Compiles the Triton kernels ahead of time and reads what came out; needs no GPU.

- ``targets``: what a program may use on each architecture, and the rates of one GPU of it
- ``cases``: which launches are compiled, through the real plan
- ``compile``: launch → binary, as the JIT would
- ``binary``: binary → registers, spills, shared memory, loads, stores, matrix instructions
- ``model``: binary → resident programs and the predicted share of the memory's bandwidth
- ``rules``: what no shipped configuration may do
- ``report``: the table
"""
