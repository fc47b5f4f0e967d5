"""Shape of an InternLM model, as `config.json` of its Transformers folder says it."""

from transformers.configuration_utils import PretrainedConfig


class InternLMConfig(PretrainedConfig):
    """The shape of a model, its rotary positions, and how it is talked to.

    Args:
        num_key_value_heads: heads of keys and values; None: as many as of queries.
        head_dim: size of a head; None: hidden_size / num_attention_heads.
        bias: whether the four matrices of attention have one.
        rotary: `{"base": 10000}`, with `"type"` "origin" or "dynamic", and for the latter a `"scaling_factor"`; the
            base of "dynamic" grows with texts longer than `max_position_embeddings`.
        chat_format: what stands around the messages of a conversation, see `ChatMixin.build_inputs`.
        rope_theta, rope_scaling: where there is no `rotary`: base, and `{"type": "dynamic", "factor": 1.0}`. Not kept.
    """

    model_type = "internlm"
    _auto_class = "AutoConfig"  # save_pretrained copies the code
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=103168,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        bias=True,
        rotary=None,
        chat_format=None,
        rope_theta=None,
        rope_scaling=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        if rotary is None and (rope_theta or rope_scaling):
            kind = (rope_scaling or {}).get("rope_type", (rope_scaling or {}).get("type", "origin"))
            rotary = {"base": rope_theta or 10000.0, "type": kind}
            rotary["scaling_factor"] = (rope_scaling or {}).get("factor", 1.0)
        self.rotary = {"base": 10000.0, "type": "dynamic"} if rotary is None else rotary
        if self.rotary.get("type", "origin") not in ("origin", "dynamic"):
            raise ValueError(f"rotary type {self.rotary['type']!r} is neither 'origin' nor 'dynamic'")
        self.chat_format = chat_format
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
