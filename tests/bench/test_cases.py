"""Names and sizes of what is measured."""

import pytest

from moe_jax.bench import CASES, parse_case, parse_peers, parse_tokens


def test_a_name_gives_the_shape_of_the_model():
    config = parse_case("qwen3-235b").config("float16")
    assert (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size) == (128, 8, 4096, 1536)
    assert config.dtype == "float16"
    assert all(parse_case(name) is case for name, case in CASES.items())


def test_four_numbers_give_a_shape_whose_name_can_be_a_file():
    case = parse_case("64, 6,2048,1408")
    assert (case.num_experts, case.top_k, case.hidden_size, case.intermediate_size) == (64, 6, 2048, 1408)
    assert case.name == "E64-k6-H2048-I1408"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qwen4", ["qwen4", "qwen3-30b-a3b", "E,k,H,I"]),
        ("8,2,64", ["8,2,64", "3 numbers"]),
        ("8,2,64,32,1", ["5 numbers"]),
        ("8,2,64,x", ["whole numbers"]),
        ("8,9,64,32", ["top_k=9", "num_experts=8"]),
        ("8,0,64,32", ["top_k=0"]),
    ],
)
def test_wrong_cases_say_what_is_wrong(text, words):
    with pytest.raises(ValueError) as error:
        parse_case(text)
    assert all(word in str(error.value) for word in words), error.value


def test_tokens_are_sorted_and_each_counts_once():
    assert parse_tokens("128, 0,16,128") == (0, 16, 128)


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "1.5", "many"])
def test_wrong_tokens_raise(text):
    with pytest.raises(ValueError, match="not a whole number"):
        parse_tokens(text)


def test_unknown_peers_raise_with_the_known_ones():
    assert parse_peers("xla, torch,xla") == ("xla", "torch")
    assert parse_peers("") == ()
    with pytest.raises(
        ValueError, match="megablox.*torch, vllm, sonicmoe, cutlass, deepgemm, tokamax, ragged_dot, xla"
    ):
        parse_peers("torch,megablox")
