"""InternLM for Transformers, 4.30 to 5.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    response, history = model.chat(tokenizer, "hello", history=[])
    for response, history in model.stream_chat(tokenizer, "hello", history=[]): ...

A Llama with biases in attention. Rotary positions are counted over the tokens that the attention mask leaves in, and
with `"dynamic"` the base follows the length of each text (base · (s·n/P − (s − 1))^(E/(E − 2)) for n over P tokens).
Keys are then kept before they are turned, and turned anew in each step, so that all have one base, as in the code of
2023. What deeper layers made of earlier tokens stays as it was: beyond P, a text that was generated and the same text
read at once differ a little. Letters of shapes: B texts, T new tokens, L tokens with the kept ones, H heads, E size of
a head.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .chat_internlm import ChatMixin
from .configuration_internlm import InternLMConfig

try:
    from transformers import DynamicCache
except ImportError:  # Transformers before 4.36 keeps tuples of keys and values
    DynamicCache = None


class InternLMRMSNorm(nn.Module):
    """Divides by the root mean square, in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Return x [..., D], normalised and scaled."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


class InternLMMLP(nn.Module):
    """Gate, up and down without biases."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        """Return the layer's output for x [..., D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InternLMAttention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.turns_late = config.rotary.get("type") == "dynamic"
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(self, x, rotation, mask, past, weights_wanted):
        """Return output [B, T, D], attention weights [B, H, T, L] or None, and (keys, values) to keep.

        Args:
            x: [B, T, D].
            rotation: cos and sin of all positions, each [B or 1, 1, L, E].
            mask: [B or 1, 1, T, L], True where a token is seen, or added to the logits; None: causal.
            past: a Cache, (keys, values), or None.
            weights_wanted: whether attention weights are returned.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        new = [part[:, :, -length:] for part in rotation]
        q = _rotated(q, new)
        if not self.turns_late:
            k = _rotated(k, new)
        if isinstance(past, tuple):
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        elif past is not None:
            k, v = past.update(k, v, self.layer)
        kept = (k, v)
        if self.turns_late:
            k = _rotated(k, rotation)
        if self.kv_heads != self.heads:
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        if weights_wanted:
            out, weights = _plain_attention(q, k, v, mask)
        else:
            weights = None
            out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and length > 1)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), weights, kept


class InternLMDecoderLayer(nn.Module):
    """Attention and MLP, each normalised before and added."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = InternLMAttention(config, layer)
        self.mlp = InternLMMLP(config)
        self.input_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation, mask, past, weights_wanted):
        """Return what the attention does, with the layer's output in place of its own."""
        out, weights, kept = self.self_attn(self.input_layernorm(x), rotation, mask, past, weights_wanted)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), weights, kept


class InternLMPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know."""

    config_class = InternLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLMDecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, InternLMRMSNorm):
            nn.init.ones_(module.weight)

    if not hasattr(PreTrainedModel, "_set_gradient_checkpointing"):  # Transformers before 4.35

        def _set_gradient_checkpointing(self, module, value=False):
            if isinstance(module, InternLMModel):
                module.gradient_checkpointing = value


class InternLMModel(InternLMPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config):
        super().__init__(config)
        # No padding_idx: with pad = eos it would keep the row of eos from learning.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLMDecoderLayer(config, n) for n in range(config.num_hidden_layers)])
        self.norm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """Return the embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Return hidden states [B, T, D] and what to keep of keys and values.

        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, D].
            attention_mask: [B, L], 0 for tokens that are not there; or [B, 1, T, L] as attention takes it.
            position_ids: [B, T], of the new tokens; None: the tokens that are there, counted.
            past_key_values: of the tokens before.
            use_cache, output_attentions, output_hidden_states, return_dict: as everywhere in Transformers.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past = past_key_values
        if self.gradient_checkpointing and self.training:
            use_cache = False
        elif use_cache and past is None and DynamicCache is not None:
            past = DynamicCache()
        is_tuple = past is None or not hasattr(past, "get_seq_length")
        total = _length(past) + x.shape[1]
        rotation = self._rotation(x, total, attention_mask, position_ids)
        mask = _mask(attention_mask, x, total)
        states, weights, kept = [], [], []
        for number, layer in enumerate(self.layers):
            states.append(x)
            its_past = past if not is_tuple else tuple(past[number]) if past is not None else None
            if self.gradient_checkpointing and self.training:
                out = checkpoint(layer, x, rotation, mask, its_past, output_attentions, use_reentrant=False)
            else:
                out = layer(x, rotation, mask, its_past, output_attentions)
            x = out[0]
            weights.append(out[1])
            kept.append(out[2])
        x = self.norm(x)
        result = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=(tuple(kept) if is_tuple else past) if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return result if return_dict is not False else result.to_tuple()

    def _rotation(self, x, total, attention_mask, position_ids):
        """Return cos and sin of all positions, each [B or 1, 1, L, E]."""
        if attention_mask is not None and attention_mask.dim() == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            positions = torch.arange(total, device=x.device)[None]
        if position_ids is not None:
            new = position_ids.view(-1, x.shape[1]).to(x.device)
            before = positions[:, : total - x.shape[1]].expand(new.shape[0], -1)
            positions = torch.cat((before, new), dim=1)
        size, rotary = self.config.head_dim, self.config.rotary
        base = torch.full((positions.shape[0],), float(rotary.get("base", 10000.0)), device=x.device)
        if rotary.get("type") == "dynamic":
            lengths, trained = positions.amax(dim=1).float() + 1, self.config.max_position_embeddings
            scale = float(rotary.get("scaling_factor") or 1.0)
            stretch = (scale * lengths / trained - (scale - 1)) ** (size / (size - 2))
            base = torch.where(lengths > trained, base * stretch, base)
        turns = base[:, None] ** (-torch.arange(0, size, 2, device=x.device).float() / size)  # [B, E/2]
        angles = positions[:, None, :, None].float() * turns[:, None, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class InternLMForCausalLM(InternLMPreTrainedModel, GenerationMixin, ChatMixin):
    """The language model; `chat` and `stream_chat` talk to it."""

    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies the code
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # 4.x reads the keys

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, return_dict=None, **kwargs):
        """Return logits [B, T, V], and the mean loss of the next tokens where `labels` [B, T] are given (-100: none).

        Args:
            input_ids: [B, T].
            labels: as input_ids; the model shifts them.
            logits_to_keep: number of last positions that get logits; 0: all.
            return_dict: False: a tuple.
            kwargs: as of `InternLMModel`.
        """
        outputs = self.model(input_ids, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            wide = logits[:, :-1].float().reshape(-1, logits.shape[-1])
            loss = functional.cross_entropy(wide, labels[:, 1:].reshape(-1).to(wide.device))
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict is not False else result.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, logits_to_keep=0, **kwargs
    ):
        """Return what the next step of `generate` reads: the tokens that have no keys yet."""
        seen = _length(past_key_values)
        inputs = {"input_ids": input_ids[:, seen:]}
        if inputs_embeds is not None and not seen:
            inputs = {"inputs_embeds": inputs_embeds}
        return {
            **inputs,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
            "use_cache": kwargs.get("use_cache"),
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        if past_key_values is None:
            return None
        if hasattr(past_key_values, "reorder_cache"):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values
        return tuple(tuple(part.index_select(0, beam_idx.to(part.device)) for part in kept) for kept in past_key_values)


def _length(past):
    """Return the number of tokens that have keys."""
    if past is None:
        return 0
    return int(past.get_seq_length()) if hasattr(past, "get_seq_length") else past[0][0].shape[2]


def _rotated(x, rotation):
    """Return x [B, H, T, E] with each pair (e, e + E/2) turned."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _mask(attention_mask, x, total):
    """Return which of L tokens each new one sees [B or 1, 1, T, L]; None where causality says it all."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    length = x.shape[1]
    is_full = attention_mask is None or bool(attention_mask.all())
    if is_full and length in (1, total):
        return None
    seen = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
    if is_full:
        return seen[None, None]
    itself = torch.eye(length, total, dtype=torch.bool, device=x.device).roll(total - length, dims=1)
    # Padding sees itself: a row that sees nothing would be NaN.
    return (seen & attention_mask[:, None, None, :].bool()) | itself


def _plain_attention(q, k, v, mask):
    """Return attention and its weights, computed step by step."""
    logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    weights = logits.float().softmax(dim=-1).to(q.dtype)
    return weights @ v, weights
