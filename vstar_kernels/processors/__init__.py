"""``tar_attention`` in the front ends, one module for each; none is imported with the package."""
