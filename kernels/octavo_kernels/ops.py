"""The one list of ops. Signatures, shapes and meaning are those of the reference functions; the backend that runs a
call is chosen by device and by what each backend supports (see `octavo_kernels.registry`)."""

from __future__ import annotations

from octavo_kernels.reference import activation, attention, cascade, kv_cache, lora, mla, moe, norm, quantize, sampling
from octavo_kernels.reference import linear as _linear
from octavo_kernels.reference import scaled_linear as _scaled_linear
from octavo_kernels.registry import Op

# Normalisation
rms_norm = Op(norm.rms_norm)
add_rms_norm = Op(norm.add_rms_norm)
layer_norm = Op(norm.layer_norm)
rms_norm_quantize = Op(quantize.rms_norm_quantize)
add_rms_norm_quantize = Op(quantize.add_rms_norm_quantize)

# Attention over the paged KV cache
rope_and_store_kv = Op(kv_cache.rope_and_store_kv)
paged_attention = Op(attention.paged_attention)
varlen_attention = Op(attention.varlen_attention)
cascade_attention = Op(cascade.cascade_attention)
mla_attention = Op(mla.mla_attention)
copy_blocks = Op(kv_cache.copy_blocks)

# Gated activations
silu_and_mul = Op(activation.silu_and_mul)
gelu_and_mul = Op(activation.gelu_and_mul)
clamped_swiglu_and_mul = Op(activation.clamped_swiglu_and_mul)
silu_and_mul_quantize = Op(quantize.silu_and_mul_quantize)
quantize_rows = Op(quantize.quantize_rows)

# Matrix products
pack_weight = Op(_linear.pack_weight)
linear = Op(_linear.linear)
scaled_linear = Op(_scaled_linear.scaled_linear)
embedding = Op(_linear.embedding)
add_lora = Op(lora.add_lora)

# Mixture of experts
route_experts = Op(moe.route_experts)
moe_mlp = Op(moe.moe_mlp)

# From logits to tokens
apply_penalties = Op(sampling.apply_penalties)
apply_bitmask = Op(sampling.apply_bitmask)
sample = Op(sampling.sample)
token_logprobs = Op(sampling.token_logprobs)
verify_drafts = Op(sampling.verify_drafts)
