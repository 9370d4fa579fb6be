"""Two-layer models of every layout that matters, built from configs: no downloads, random weights, fixed seed."""

import torch
import transformers as tf
from torch import Tensor, nn

from eckart.tasks import Example, make_task

VOCABULARY = 97

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_PLAIN = {**_SIZES, "intermediate_size": 80}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name: (model class, config)
MODELS: dict[str, tuple[type, object]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**_GATED, tie_word_embeddings=True)),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**_GATED, head_dim=8)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**_GATED, sliding_window=8)),
    "gemma2": (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(**_GATED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    ),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    ),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config(**_GATED)),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT)),
    "gptj": (tf.GPTJForCausalLM, tf.GPTJConfig(**_GPT, rotary_dim=4)),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_PLAIN)),
    "falcon": (tf.FalconForCausalLM, tf.FalconConfig(**_SIZES)),
    "falcon_rw": (
        tf.FalconForCausalLM,
        tf.FalconConfig(**_SIZES, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    ),
    "falcon_grouped": (
        tf.FalconForCausalLM,
        tf.FalconConfig(**_SIZES, new_decoder_architecture=True, num_kv_heads=2),
    ),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen3_moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(
            **_GATED,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
        ),
    ),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**_PLAIN)),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**_PLAIN)),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
    ),
    "t5_gated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=80,
            image_size=16,
            patch_size=8,
        ),
    ),
    "decision_transformer": (
        tf.DecisionTransformerModel,
        tf.DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=32, n_layer=3, n_head=4, max_ep_len=64),
    ),
    "llama_relu": (tf.LlamaForCausalLM, tf.LlamaConfig(**_GATED, hidden_act="relu")),
    "bloom": (
        tf.BloomForCausalLM,
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(**_SIZES, ffn_dim=80, word_embed_proj_dim=32),
    ),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig(**_GATED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    ),
}
CAUSAL = """
    llama qwen3 mistral gemma2 gemma3 phi3 gpt2 gptj gpt_neox falcon falcon_rw falcon_grouped mixtral qwen3_moe bloom
    llama_relu opt gpt_oss
""".split()  # noqa: SIM905 - easier to read
MASKED = ["bert", "roberta"]
ENCODER_DECODER = ["t5", "t5_gated"]


def build(name: str, seed: int = 0) -> nn.Module:
    """Make the model with weights large enough that every part of it matters to the output."""
    make, config = MODELS[name]
    torch.manual_seed(seed)
    model = make(type(config)(**config.to_dict())).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def inputs(name: str, *, batch: int = 2, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Give forward() arguments for `build(name)`."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name == "decision_transformer":
        return {
            "states": torch.randn(batch, tokens, 5, generator=generator),
            "actions": torch.randn(batch, tokens, 3, generator=generator),
            "rewards": torch.randn(batch, tokens, 1, generator=generator),
            "returns_to_go": torch.randn(batch, tokens, 1, generator=generator),
            "timesteps": torch.arange(tokens).expand(batch, -1),
            "attention_mask": torch.ones(batch, tokens),
        }
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    if name in ENCODER_DECODER:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids}


def output(name: str, model: nn.Module, **arguments) -> Tensor:
    """Run the model and return its main output tensor."""
    with torch.inference_mode():
        result = model(**arguments)
    return result.action_preds if name == "decision_transformer" else result.logits


def tokenizer(*, bos: bool = True, mask: bool = False, eos: bool = False):
    """Make a word-level tokenizer over the words w5 … w96; unknown words are an error in the tests' data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "[MASK]": 4} | {f"w{i}": i for i in range(5, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pattern = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(pattern), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    extra = {"mask_token": "[MASK]"} if mask else {}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    )


def sentence(count: int, seed: int) -> str:
    """Give a sentence of that tokenizer's words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(5, VOCABULARY, (count,), generator=generator).tolist())


def chain(documents=24, words=40):
    """Documents with something to learn: each word follows from the one before it."""
    rows = []
    for start in range(documents):
        ids = [(start * 5) % 90]
        for _ in range(words - 1):
            ids.append((7 * ids[-1] + 3) % 90)
        rows.append(" ".join(f"w{5 + i}" for i in ids))
    return make_task("chain", [Example(row, None) for row in rows])
