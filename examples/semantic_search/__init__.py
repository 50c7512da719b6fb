"""Semantic search over Paddle's own API documentation.

The encoder is all-MiniLM-L6-v2: six layers, 384 wide, 12 heads, with its pretrained weights. It is built of Paddle's
layers, converted to fused operators by `paddle_fused_attention.convert`, and runs in dygraph and as a static program,
on texts packed one after another: no padded token is computed.
Its numbers are compared with those of Paddle's own layers, and of ONNX Runtime and OpenVINO where they are installed.

    python -m examples.semantic_search [--top K] ["query" ...]
"""
