"""The only place that touches private or version-dependent torch names (2.11 to 2.13).

Each function says which versions differ, and is the one line to change when they do.
"""
