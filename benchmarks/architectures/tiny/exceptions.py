"""What single configurations have to be told, beside their sizes, by model type."""

from __future__ import annotations

from typing import Any

_FULL, _LINEAR, _SLIDING = "full_attention", "linear_attention", "sliding_attention"
_FOUR_LAYERS = {"num_hidden_layers": 4}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_ROTARY_3D = {**_ROTARY, "mrope_section": [2, 1, 1]}
_ONE_TILE = {"image_grid_pinpoints": [[64, 64]], "vision_feature_layer": -1}
_SWIN = {
    "embed_dim": 24,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
_ZAMBA = {
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "mamba_d_state": 8,
}
_SOUND = {"max_source_positions": 32}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Rotary positions of several axes, whose sections add up to half a head.
    **{
        name: {"rope_parameters": _ROTARY_3D}
        for name in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm4v_text",
            "glm46v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
        )
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            **_ROTARY_3D,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5,
        }
    },
    # Patterns of layers that need more than two, or a kind of each.
    **{
        name: _FOUR_LAYERS
        for name in (
            "lfm3",
            "qwen3_5",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "qwen3_next",
            "qwen4_exp_text",
            "olmo_hybrid",
        )
    },
    "bailing_hybrid": {
        "layer_types": [_LINEAR, _FULL],
        "n_group": 1,
        "topk_group": 1,
        "num_experts": 4,
    },
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": [_SLIDING, _FULL],
        "rope_parameters": {_SLIDING: _ROTARY, _FULL: _ROTARY},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": [_LINEAR, _FULL],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", _FULL]},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        **_ZAMBA,
        "num_hidden_layers": 5,
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid", _LINEAR],
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        **_ZAMBA,
        "num_hidden_layers": 3,
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
    },
    # Heads and groups that have to divide each other.
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "esmc": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "pegasus_x": {"block_size": 4, "num_global_tokens": 3},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "num_hashes": 1,
        "num_buckets": 2,
        "is_decoder": True,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "feed_forward_size": 64,
    },
    # Vocabularies, tokens and languages.
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 3},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    # Images.
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "blip-2": {"image_token_index": 5, "num_query_tokens": 4},
    "donut-swin": {**_SWIN, "drop_path_rate": 0.0},
    "efficientnet": {"hidden_dim": 2560, "image_size": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    "instructblip": {"image_token_index": 5, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 5, "num_query_tokens": 4},
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "patch_size": 16,
    },
    "llava_next": _ONE_TILE,
    "llava_next_video": _ONE_TILE,
    "llava_onevision": _ONE_TILE,
    "mllama_vision_model": {
        "intermediate_layers_indices": [0, 1],
        "num_global_layers": 1,
        "vision_output_dim": 96,
    },
    "mobilevitv2": {"image_size": 64},
    "paligemma": {
        "text_config": {"num_key_value_heads": 4, "head_dim": 8, "num_attention_heads": 4}
    },
    "qwen2_5_vl": {"vision_config": {"fullatt_block_indexes": [1], "window_size": 32}},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "window_size": 32},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "vipllava": {"vision_feature_layers": [-1]},
    # Sound.
    "audioflamingo3_encoder": _SOUND,
    "canary": {"pad_token_id": 0},
    "cohere_asr": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "moonshine": {
        "pad_token_id": 0,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "qwen2_audio_encoder": _SOUND,
    "voxtral_encoder": _SOUND,
}
