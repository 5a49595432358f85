"""The HTTP server: SGLang's native API over Sanic. Never imports jax, not even indirectly."""
