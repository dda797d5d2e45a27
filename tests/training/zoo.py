"""Published architectures: the library's name of the kind, the config's values where they are not its defaults, and how
many parameters were published, in 1e9."""


def sizes(vocab, hidden, inner, layers, heads, kv_heads=None, **more):
    """The names that most configs share."""
    found = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    found |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads or heads}
    return {**found, **more}


TIED = {"tie_word_embeddings": True}
ZOO = {
    "LLaMA-7B": ("llama", sizes(32000, 4096, 11008, 32, 32), 6.74),
    "LLaMA-13B": ("llama", sizes(32000, 5120, 13824, 40, 40), 13.02),
    "LLaMA-65B": ("llama", sizes(32000, 8192, 22016, 80, 64), 65.29),
    "Llama-2-70B": ("llama", sizes(32000, 8192, 28672, 80, 64, 8), 68.98),
    "Llama-3-8B": ("llama", sizes(128256, 4096, 14336, 32, 32, 8), 8.03),
    "Llama-3.1-405B": ("llama", sizes(128256, 16384, 53248, 126, 128, 8), 405.85),
    "Llama-3.2-1B": ("llama", sizes(128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED), 1.236),
    "SmolLM2-135M": ("llama", sizes(49152, 576, 1536, 30, 9, 3, **TIED), 0.1345),
    "SmolLM3-3B": ("smollm3", sizes(128256, 2048, 11008, 36, 16, 4, **TIED), 3.075),
    "OPT-125M": (
        "opt",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}
        | {"vocab_size": 50272, "word_embed_proj_dim": 768},
        0.1252,
    ),
    "OPT-350M": (
        "opt",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}
        | {"vocab_size": 50272, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        0.3312,
    ),
    "OPT-6.7B": (
        "opt",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384}
        | {"vocab_size": 50272, "word_embed_proj_dim": 4096},
        6.658,
    ),
    "GPT-2": ("gpt2", {}, 0.1244),
    "GPT-2 XL": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1.558),
    "GPT-J-6B": ("gptj", {}, 6.05),
    "GPT-Neo-2.7B": (
        "gpt_neo",
        {"hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]]},
        2.651,
    ),
    "GPT-NeoX-20B": ("gpt_neox", {}, 20.55),
    "Pythia-6.9B": (
        "gpt_neox",
        {"vocab_size": 50432, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"intermediate_size": 16384},
        6.857,
    ),
    "BLOOM-7.1B": ("bloom", {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}, 7.069),
    "Falcon-7B": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "bias": False},
        6.922,
    ),
    "Falcon-40B": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "bias": False}
        | {"num_kv_heads": 8, "new_decoder_architecture": True},
        41.3,
    ),
    "MPT-7B": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}, 6.649),
    "Mistral-7B": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096), 7.24),
    "Mixtral-8x7B": ("mixtral", sizes(32000, 4096, 14336, 32, 32, 8), 46.70),
    "Qwen2.5-0.5B": ("qwen2", sizes(151936, 896, 4864, 24, 14, 2, **TIED), 0.494),
    "Qwen2-7B": ("qwen2", sizes(152064, 3584, 18944, 28, 28, 4), 7.616),
    "Qwen3-8B": ("qwen3", sizes(151936, 4096, 12288, 36, 32, 8, head_dim=128), 8.19),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        sizes(151936, 2048, 6144, 48, 32, 4, head_dim=128, moe_intermediate_size=768, num_experts=128),
        30.53,
    ),
    "Gemma-7B": ("gemma", sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256), 8.538),
    "Gemma-2-9B": ("gemma2", sizes(256000, 3584, 14336, 42, 16, 8, head_dim=256), 9.242),
    "Gemma-3-1B": ("gemma3_text", sizes(262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512), 1.0),
    "Gemma-3-27B": ("gemma3_text", sizes(262208, 5376, 21504, 62, 32, 16, head_dim=128, sliding_window=1024), 27.01),
    "Phi-2": ("phi", sizes(51200, 2560, 10240, 32, 32, partial_rotary_factor=0.4), 2.78),
    "Phi-3-mini": ("phi3", sizes(32064, 3072, 8192, 32, 32), 3.821),
    "Phi-4": ("phi3", sizes(100352, 5120, 17920, 40, 40, 10), 14.66),
    "StableLM-3B": ("stablelm", sizes(50304, 2560, 6912, 32, 32), 2.795),
    "StarCoder2-7B": ("starcoder2", sizes(49152, 4608, 18432, 32, 36, 4), 7.174),
    "OLMo-7B": ("olmo", sizes(50304, 4096, 11008, 32, 32), 6.888),
    "OLMo-2-7B": ("olmo2", sizes(100352, 4096, 11008, 32, 32), 7.299),
    "OLMoE-1B-7B": ("olmoe", sizes(50304, 2048, 1024, 16, 16, num_experts=64), 6.919),
    "Command R": ("cohere", sizes(256000, 8192, 22528, 40, 64), 34.98),
    "Granite-3-8B": ("granite", sizes(49155, 4096, 12800, 40, 32, 8, **TIED), 8.17),
    "GLM-4-9B": ("glm", sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128), 9.4),
}
