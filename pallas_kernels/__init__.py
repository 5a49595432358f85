"""The operations that jaxserve's models call, each with a plain reference and one file per backend.

Depends on jax alone, so it can be used without the rest of jaxserve.
"""
