"""``experts_implementation="moe_jax"``: tiny models of transformers, float32, against their own eager experts."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.integrations.moe import ExpertsInterface  # noqa: E402

from moe_jax_torch import ops  # noqa: E402
from moe_jax_torch.transformers import experts_forward, own_weights, register  # noqa: E402
from tests.util import assert_discriminates, check_close  # noqa: E402

register()

EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 12
LOGITS, GRADIENTS = 2e-6, 1e-5  # relative

TINY = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}
TOP2 = {"num_experts_per_tok": 2}
LOCAL = TOP2 | {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE}
LISTED = TOP2 | {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE}
ROUTED = TOP2 | {"n_routed_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "n_shared_experts": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# name: (config class, its arguments besides TINY). All eight go through transformers' experts interface.
MODELS = {
    "mixtral": ("MixtralConfig", LOCAL),
    "qwen3_moe": ("Qwen3MoeConfig", LISTED | {"norm_topk_prob": True, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3Config", ROUTED | LATENT | {"n_group": 3, "topk_group": 2, "first_k_dense_replace": 1}),
    "gpt_oss": ("GptOssConfig", LOCAL | {"head_dim": 8}),
    "olmoe": ("OlmoeConfig", LISTED | {"intermediate_size": INTERMEDIATE}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED | {"head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "granitemoe": ("GraniteMoeConfig", LOCAL),
    "phimoe": ("PhimoeConfig", LOCAL),
}


def model_of(name, **more):
    """In the mode of evaluation: the router of Phi-MoE draws at random while it trains."""
    kind, arguments = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    config = getattr(transformers, kind)(**TINY | arguments | more)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.2)
    return model


def tokens():
    return torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(7))


def logits_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(tokens(), use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            check_close(found[name], gradient, GRADIENTS)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    model = model_of(request.param)
    own_weights(model)
    return model


def test_logits_gradients_and_generated_text_equal_eager(model):
    expected, wanted = logits_and_gradients(model, "eager")
    logits, gradients = logits_and_gradients(model, "moe_jax")
    assert_discriminates(lambda logits: check_close(logits, expected, LOGITS), logits)
    check_gradients(gradients, wanted)
    assert any("experts.gate_up_proj" in name for name in gradients)
    texts = []
    for implementation in ("eager", "moe_jax"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(tokens(), max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "damage", [torch.zeros_like, lambda out: out.roll(1, 0), lambda out: 1.5 * out], ids=["zero", "permuted", "scaled"]
)
def test_broken_experts_show_in_the_logits(damage):
    ExpertsInterface.register("broken", lambda *arguments: damage(experts_forward(*arguments)))
    model = model_of("mixtral")
    expected, wanted = logits_and_gradients(model, "eager")
    logits, gradients = logits_and_gradients(model, "broken")
    with pytest.raises(AssertionError):
        check_close(logits, expected, 1e-2)
    with pytest.raises(AssertionError):
        check_gradients(gradients, wanted)


def test_a_frozen_model_pays_for_no_gradient_of_its_experts(monkeypatch):
    seen = []
    backward = ops.calls.experts_backward
    monkeypatch.setattr(ops.calls, "experts_backward", lambda *a, **k: seen.append(k["needs"]) or backward(*a, **k))
    model = model_of("qwen3_moe").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    expected, wanted = logits_and_gradients(model, "eager")
    logits, gradients = logits_and_gradients(model, "moe_jax")
    check_close(logits, expected, LOGITS)
    check_gradients(gradients, wanted)
    assert seen == [(True, False, False, True, False, False)] * 2  # of two layers
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(model(tokens(), use_cache=False).logits, logits)


def test_gradient_checkpointing_and_autocast():
    model = model_of("mixtral").train()
    expected, wanted = logits_and_gradients(model, "moe_jax")
    model.gradient_checkpointing_enable()
    logits, gradients = logits_and_gradients(model, "moe_jax")
    assert torch.equal(logits, expected)
    check_gradients(gradients, wanted)
    model.gradient_checkpointing_disable()
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = slots_of(experts)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, ids, weights)
    assert out.dtype == torch.float32
    check_close(out.detach(), experts(x, ids, weights).detach(), 1e-2)


def slots_of(experts, count=9, top_k=2):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, HIDDEN, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    return x, ids, torch.rand(count, top_k, generator=generator) + 0.2


def test_25_steps_of_training_are_those_of_eager():
    losses = {}
    for implementation in ("eager", "moe_jax"):
        model = model_of("granitemoe", num_hidden_layers=1).train()
        model.set_experts_implementation(implementation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[implementation] = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    check_close(losses["moe_jax"], losses["eager"], 1e-4)
    assert losses["moe_jax"][-1] < 0.5 * losses["moe_jax"][0]


def test_a_model_that_was_saved(tmp_path):
    model = model_of("gpt_oss", num_hidden_layers=1)
    model.set_experts_implementation("moe_jax")
    own_weights(model)
    expected = model(tokens()).logits.detach()
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path, experts_implementation="moe_jax", dtype=torch.float32).eval()
    own_weights(again)
    assert torch.equal(again(tokens()).logits.detach(), expected)
