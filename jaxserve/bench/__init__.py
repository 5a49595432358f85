"""`jaxserve bench`: measures an engine in this process, or any server that speaks /generate."""
