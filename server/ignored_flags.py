"""Flags of SGLang that choose between CUDA or torch implementations. A script made for it may pass
them; they have no meaning here, so they are taken with a warning."""

IGNORED = (
    "--attention-backend",
    "--base-gpu-id",
    "--cuda-graph-bs",
    "--cuda-graph-max-bs",
    "--decode-attention-backend",
    "--disable-cuda-graph",
    "--disable-cuda-graph-padding",
    "--disable-custom-all-reduce",
    "--enable-nccl-nvls",
    "--enable-p2p-check",
    "--enable-torch-compile",
    "--gpu-id-step",
    "--mm-attention-backend",
    "--nccl-port",
    "--prefill-attention-backend",
    "--sampling-backend",
    "--torch-compile-max-bs",
    "--triton-attention-num-kv-splits",
    "--triton-attention-reduce-in-fp32",
    "--trust-remote-code",
)
