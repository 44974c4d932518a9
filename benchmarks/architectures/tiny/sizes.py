"""Sizes of a tiny model, by the name that a configuration has for them."""

from __future__ import annotations

_WIDTH = """
hidden_size d_model n_embd dim embed_dim emb_dim model_dim embedding_size word_embed_proj_dim n_embed
encoder_hidden_size decoder_hidden_size mm_hidden_size model_hidden_size text_hidden_size
vision_hidden_size transformer_hidden_size qformer_hidden_size query_dim lru_width
attention_hidden_size hidden_dim out_hidden_size output_dim projection_dim proj_size
classifier_proj_size input_embedding_size cross_attention_hidden_size global_hidden_size latent_dim
patch_hidden_size d_latents embed_proj_dim moe_intermediate_size shared_expert_intermediate_size
expert_ffn_hidden_size expert_intermediate_size shared_intermediate_size
moe_shared_expert_intermediate_size swa_intermediate_size expert_hidden_size moe_latent_size expert_dim
image_size img_size
"""
_INNER_WIDTH = """
d_inner output_embedding_size projector_hidden_size alignment_intermediate_size projector_input_dim
projector_output_dim dff intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
dim_ff encoder_intermediate_size decoder_intermediate_size hidden_mlp_size intermediate_dim mlp_dim
dense_intermediate_size intermediate_size_mlp feed_forward_size inner_dim ffn_intermediate_size
block_ff_dim qformer_intermediate_size n_inner
"""
_TWO = """
num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers
num_encoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers num_global_layers
vision_layers mm_layers resampler_depth num_blocks_per_stage num_hidden_groups
num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num encoder_num_key_value_heads
decoder_num_key_value_heads global_num_key_value_heads swa_num_key_value_heads
num_global_key_value_heads linear_num_key_heads
num_experts_per_tok num_experts_per_token moe_topk moe_top_k top_k_experts moe_k num_selected_experts
moe_num_experts_per_tok expert_top_k experts_per_token num_experts_per_topk
"""
_FOUR = """
num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
attention_heads num_query_heads resampler_n_heads num_cross_attention_heads
encoder_num_attention_heads decoder_num_attention_heads num_self_attention_heads num_attn_heads
num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads index_n_heads
num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts n_experts
zero_expert_num
"""
_EIGHT = """
head_dim d_kv attention_head_dim kv_channels swa_head_dim global_head_dim resampler_head_dim
index_head_dim attn_head_dim linear_key_head_dim linear_value_head_dim kda_head_dim v_head_dim
qk_nope_head_dim qk_rope_head_dim swa_v_head_dim hidden_size_per_layer_input laurel_rank
per_layer_hidden index_topk bottleneck_size mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads
sliding_window sliding_window_size attention_window_size window_size_text attention_chunk_size
patch_size
"""
_ONE = """
n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups
moe_num_shared_experts moe_layer_start_index num_dense_layers
"""
_STATE = "q_lora_rank kv_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size"
_LENGTH = """
max_position_embeddings n_positions max_seq_len max_target_positions n_ctx max_sequence_length max_len
max_seq_length seq_length
"""
_VOCABULARY = """
vocab_size decoder_vocab_size encoder_vocab_size src_vocab_size tgt_vocab_size
vocab_size_per_layer_input text_vocab_size semantic_vocab_size n_tokens char_vocab_size audio_vocab_size
"""

VOCABULARY = 99
"""Tokens of every text model."""

SIZES = {
    name: size
    for size, names in (
        (1, _ONE),
        (2, _TWO),
        (4, _FOUR),
        (8, _EIGHT),
        (16, _STATE),
        (32, _WIDTH),
        (64, _INNER_WIDTH),
        (128, _LENGTH),
        (VOCABULARY, _VOCABULARY),
    )
    for name in names.split()
}
"""What a size becomes where it is larger."""

ONE_EACH = ("depths", "num_hidden_blocks", "layer_depths")
"""Lists of how many layers there are in each stage."""
