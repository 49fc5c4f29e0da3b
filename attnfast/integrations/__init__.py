"""attnfast inside other libraries' models. Nothing here takes effect on import.

`attnfast.integrations.sdpa` computes torch's own ``scaled_dot_product_attention``,
`attnfast.integrations.flash_attn` has flash-attn's functions, and
`attnfast.integrations.transformers` is an attention implementation for Hugging Face's models.
"""
