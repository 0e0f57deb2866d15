"""``experts_implementation="moe_jax"`` on a GPU: experts and small models of transformers against their own eager code."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moe_jax_torch.transformers import own_weights, register  # noqa: E402
from tests.interop.test_transformers_experts import model_of  # noqa: E402
from tests.util import check_close, relative_error  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*runs its plain-JAX form"),  # float32 has no kernels
]

register()

# Sizes that the kernels take.
LARGER = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
INNER = {
    "mixtral": {"intermediate_size": 192},
    "qwen3_moe": {"moe_intermediate_size": 192},
    "gpt_oss": {"intermediate_size": 192},
    "glm4_moe": {"moe_intermediate_size": 192},
}


def experts_of(name, dtype):
    model = model_of(name, **LARGER | INNER[name])
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 256**-0.5)
    experts.to("cuda", dtype)
    own_weights(experts)
    return experts


def run(experts, implementation, dtype, tokens=300):
    """In float32: output, and the gradients of the hidden states, the weights of the slots and the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 256, generator=generator).to("cuda", dtype).requires_grad_()
    ids = torch.rand(tokens, experts.num_experts, generator=generator).argsort(dim=1)[:, :2].cuda()
    weights = (torch.rand(tokens, 2, generator=generator) + 0.2).cuda().requires_grad_()
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    out = experts(x, ids, weights)
    out.backward(torch.randn(out.shape, generator=generator).to("cuda", dtype))
    return [
        tensor.detach().float().cpu() for tensor in (out, x.grad, weights.grad, *(p.grad for p in experts.parameters()))
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float32, 1e-5)], ids=["bfloat16", "float32"]
)
@pytest.mark.parametrize("name", INNER)
def test_experts_equal_eager_in_float32(name, dtype, tolerance):
    experts = experts_of(name, dtype)
    found = run(experts, "moe_jax", dtype)
    expected = run(experts.float(), "eager", torch.float32)
    for one, other in zip(found, expected, strict=True):
        check_close(one, other, tolerance)
    assert relative_error(1.5 * found[0], expected[0]) > tolerance


def test_three_stages_and_ids_of_other_ranks():
    experts = experts_of("mixtral", torch.bfloat16)
    experts.act_fn = torch.nn.Tanh()  # none of our gates
    for one, other in zip(
        run(experts, "moe_jax", torch.bfloat16), run(experts.float(), "eager", torch.float32), strict=True
    ):
        check_close(one, other, 1.5e-2)
    experts = experts_of("mixtral", torch.bfloat16)
    experts.config._experts_implementation = "moe_jax"
    x = torch.full((8, 256), float("nan"), device="cuda", dtype=torch.bfloat16)
    elsewhere = torch.full((8, 2), experts.num_experts, device="cuda")
    assert (experts(x, elsewhere, torch.zeros(8, 2, device="cuda")) == 0).all()


@pytest.mark.parametrize("name", INNER)
def test_logits_and_gradients_of_float32_models(name):
    model = model_of(name, **LARGER | INNER[name]).cuda()
    own_weights(model)
    ids = torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(7)).cuda()
    logits, gradients = {}, {}
    for implementation in ("eager", "moe_jax"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        out = model(ids, use_cache=False).logits
        out.log_softmax(-1)[..., 3].sum().backward()
        logits[implementation] = out.detach().cpu()
        gradients[implementation] = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    check_close(logits["moe_jax"], logits["eager"], 1e-4)
    for one, other in zip(gradients["moe_jax"], gradients["eager"], strict=True):
        check_close(one, other, 1e-3)


def test_a_bfloat16_model_writes_text():
    model = model_of("qwen3_moe", **LARGER | INNER["qwen3_moe"]).to("cuda", torch.bfloat16)
    own_weights(model)
    ids = torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(7)).cuda()
    model.set_experts_implementation("moe_jax")
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.shape == (2, 13) and torch.equal(text, model.generate(ids, max_new_tokens=8, do_sample=False))
