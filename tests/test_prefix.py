"""What is skipped changes no number. Oracle: the whole model on the same batch."""

import pytest
import torch

import tiny_models as tiny
from eckart.encoding import arrange, encode
from eckart.matrices import find_blocks
from eckart.prefix import PrefixCache, agree, run_block
from eckart.scoring import only_positions, prepare, rearrange
from eckart.tasks import Example, make_task


def few_shot(count=8):
    head = tiny.sentence(20, 99)
    options = [(tiny.sentence(2, i + 50), f"w{9 + i}", f"w{40 + i} w6") for i in range(count)]
    examples = [Example(f"{head} {tiny.sentence(1 + i % 3, i)}", i % 2, options[i]) for i in range(count)]
    return make_task("few_shot", examples)


def laid_out(model, layout, batch_tokens=100):
    plain = encode(few_shot(), tiny.tokenizer(), "causal", context=None, batch_tokens=batch_tokens)
    return rearrange(model, arrange(plain, layout=layout), [0] * plain.count)


def logits(model, block, forward):
    with torch.inference_mode(), only_positions(model, block.rows, block.columns) as logits_of:
        return logits_of(forward())


@pytest.mark.parametrize("layout", ["plain", "tree", "prompts", "prefixes"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gpt_neox", "phi3", "mixtral"])
def test_passes_from_any_module_on_give_the_logits_of_whole_passes(name, layout):
    model = tiny.build(name)
    encoded = laid_out(model, layout)
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    cache = PrefixCache(model, list(stacks.items()), encoded.blocks)
    assert {len(block.passes) for block in encoded.blocks} == {
        {"plain": 1, "tree": 1, "prompts": 2, "prefixes": 3}[layout]
    }

    def check():
        for index, block in enumerate(encoded.blocks):
            whole = logits(model, block, lambda block=block: run_block(model, block))
            assert agree(logits(model, block, lambda index=index: cache.forward(index)), whole)

    for path in stacks:
        check()
        attention = next(n for n, _ in model.get_submodule(path).named_children() if "attn" in n or "attention" in n)
        with torch.inference_mode():
            cache.enter(f"{path}.{attention}")
        check()
        with torch.inference_mode():
            cache.advance()
    check()


def test_passes_before_the_last_end_at_the_last_layers_keys():
    model = tiny.build("llama")
    encoded = laid_out(model, "prefixes", batch_tokens=2048)
    (block,) = encoded.blocks
    widths = []
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _i, output: widths.append(output.shape[1]))
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, output: widths.append(-output.shape[1]))
    with torch.inference_mode():
        run_block(model, block)
    first, second, last = (one.inputs["input_ids"].shape[1] for one in block.passes)
    assert widths == [-first, -second, -last, last]


@pytest.mark.parametrize("layout", ["plain", "prefixes"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bound_is_kept_and_changes_no_bit(name, layout):
    model = tiny.build(name)
    encoded = laid_out(model, layout, batch_tokens=40)
    assert len(encoded.blocks) >= 3
    stacks = {path: stack for path, stack, _ in find_blocks(model)}

    def walk(bound):
        cache = PrefixCache(model, list(stacks.items()), encoded.blocks, cache_bytes=bound)
        found = []
        for path in stacks:
            child = next(n for n, _ in model.get_submodule(path).named_children() if "attn" in n)
            with torch.inference_mode():
                cache.enter(f"{path}.{child}")
            for step in (lambda: None, cache.advance):
                with torch.inference_mode():
                    step()
                found += [logits(model, block, lambda i=i: cache.forward(i)) for i, block in enumerate(encoded.blocks)]
                assert 0 <= cache.bytes <= cache.peak_bytes
                assert bound is None or cache.peak_bytes <= bound
        return found, cache

    expected, free = walk(None)
    hidden = 32 * 4
    assert free.bytes == hidden * sum(
        one.inputs["input_ids"].numel()
        for block in encoded.blocks
        for one in block.passes[-1:]  # the passes before it ended inside the last block
    )
    for share in (0.0, 0.3, 0.6, 1.0):
        found, cache = walk(int(share * free.peak_bytes))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert cache.peak_bytes > 0 or share == 0


def test_a_bound_holds_for_encoder_decoders():
    model, tokenizer = tiny.build("t5"), tiny.tokenizer(eos=True)
    encoded = prepare(model, tokenizer, few_shot(), batch_tokens=100)
    stacks = {path: stack for path, stack, _ in find_blocks(model)}
    whole = [logits(model, block, lambda block=block: run_block(model, block)) for block in encoded.blocks]
    free = PrefixCache(model, list(stacks.items()), encoded.blocks)
    with torch.inference_mode():
        for _ in stacks:
            free.advance()
    bound = free.peak_bytes // 2
    cache = PrefixCache(model, list(stacks.items()), encoded.blocks, cache_bytes=bound)
    for _ in stacks:
        with torch.inference_mode():
            cache.advance()
        assert cache.peak_bytes <= bound
        for index, block in enumerate(encoded.blocks):
            assert torch.equal(logits(model, block, lambda index=index: cache.forward(index)), whole[index])
    assert cache.bytes > 0
