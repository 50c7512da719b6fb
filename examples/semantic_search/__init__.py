"""Semantic search over Paddle's own API documentation.

The encoder is all-MiniLM-L6-v2: six layers, 384 wide, 12 heads, with its pretrained weights. Its attention blocks run
on `paddle_fused_attention.FusedMultiHeadAttention`, in dygraph and as a static program, and are compared with Paddle's
own layers.

    python -m examples.semantic_search [--top K] ["query" ...]
"""
