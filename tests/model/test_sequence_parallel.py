"""Sequence parallel: log-probs and gradients of a row on several processes are those on one."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import on_ranks
from tiny import GEMMA, GEMMA3, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN, _family
from torch import Tensor, nn

from fastdpo.data.batch import PackedPairs, pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.loss.choices import make_objective
from fastdpo.model import head, sequence_parallel
from fastdpo.model.adapters import add_lora
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model, reference_rows

VOCAB = 320
# Groups of heads: one, and as many as two processes don't divide.
ONE_GROUP = _family("one group", "LlamaConfig", num_key_value_heads=1)
ODD_GROUPS = _family(
    "odd groups", "LlamaConfig", hidden_size=48, num_attention_heads=12, num_key_value_heads=3
)
# Heads of keys and values have other sizes, and keys are made of a common part.
LATENT = _family(
    "latent", "DeepseekV2Config", num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
    moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
)  # fmt: skip
# Its frequencies are others over 64 tokens, which the first quarter of a long sequence can't see.
LONGROPE = _family(
    "longrope", "Phi3Config", max_position_embeddings=256, original_max_position_embeddings=64,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4, "original_max_position_embeddings": 64, "factor": 4.0,
    },
)  # fmt: skip
FAMILIES = {
    x.name: x
    for x in (
        LLAMA, QWEN, GEMMA, GEMMA3, MISTRAL, OLMO2, MIXTRAL, ONE_GROUP, ODD_GROUPS, LATENT, LONGROPE
    )
}  # fmt: skip
OF_TWO = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "olmo2", "one group", "odd groups"]
OF_TWO += ["latent", "longrope"]
OF_FOUR = [name for name in OF_TWO if name != "olmo2"]
# A process whose chunk has no target, sequences that lie in several, and others in one.
PAIRS = [
    TokenizedPair([*range(5, 47)], [*range(50, 81)], [*range(90, 99)]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
    TokenizedPair([*range(100, 131)], [*range(140, 149)], [*range(150, 177)]),
]
FEW = [TokenizedPair([3], [4], [5])]  # fewer tokens than four processes
REF = torch.tensor([-170.0, -60.0, -7.0, -20.0, -50.0, -150.0], dtype=torch.float64)


def built(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[name].build(VOCAB).to(dtype)
    model.config._experts_implementation = "eager"  # grouped products are not for fp64
    return model


def one_and_shared(plain: Any, **options: Any) -> tuple[Any, Any]:
    """A model on one process, and the same one shared by all."""
    shared = copy.deepcopy(plain)
    sequence_parallel.use(shared, dist.group.WORLD)
    one, shared = prepare_model(plain, **options), prepare_model(shared, **options)
    assert layout_of(shared) == layout_of(one)
    return one, shared


def result_of(model: Any, batch: PackedPairs, **options: Any) -> Any:
    ref_logp_S = REF[: len(batch.bounds_S1) - 1]
    options = {"ref_logp_S": ref_logp_S, "beta": 0.1, "alpha": 0.02, **options}
    model.zero_grad()
    result = packed_loss(model, batch, stats=("logp", "entropy"), **options)
    result.loss.backward()
    return result


def values_of(model: Any, result: Any) -> Iterator[tuple[str, Tensor]]:
    """All that can be compared."""
    yield from ((name, x.detach()) for name, x in result.items())
    yield from result.metrics.items()
    yield from result.stats.items()
    yield from ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def summed(model: Any) -> None:
    """Gradients summed over the group."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)


def errors(one: Any, shared: Any, batch: PackedPairs, **options: Any) -> dict[str, float]:
    """Relative differences of a shared model's numbers from those of one process."""
    wanted, found = (result_of(model, batch, **options) for model in (one, shared))
    summed(shared)
    pairs = dict(values_of(one, wanted)), dict(values_of(shared, found))
    assert pairs[0].keys() == pairs[1].keys()
    return {name: apart(pairs[1][name], x) for name, x in pairs[0].items()}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative; of a gradient that is only rounding, absolute."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    size = wanted.double().norm().clamp(min=1e-3)
    return float((found.double() - wanted.double()).norm() / size)


def largest(found: dict[str, float]) -> float:
    name = max(found, key=lambda x: found[x])
    assert torch.isfinite(torch.tensor(found[name])), name
    return found[name]


# ------------------------------------------------------------------------------------------ models
def of_families(rank: int, names: list[str]) -> dict[str, float]:
    """Errors in fp64."""
    found = {}
    for name in names:
        one, shared = one_and_shared(built(name))
        for pairs in (PAIRS, FEW):
            batch = pack_pairs(pairs, layout=layout_of(shared))
            found[f"{name}, {len(pairs)}"] = largest(errors(one, shared, batch))
    return found


def test_llama_on_two_processes():
    for found in on_ranks(2, of_families, ["llama"]):
        assert largest(found) < 1e-12, found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "names"), [(2, OF_TWO), (4, OF_FOUR)], ids=["2", "4"])
def test_models_in_fp64(world, names):
    for found in on_ranks(world, of_families, names):
        assert all(error < bound_of(name) for name, error in found.items()), found


def bound_of(name: str) -> float:
    """Gemma's norms and the rotation of a latent attention round to fp32, whatever the dtype."""
    return 1e-6 if name.startswith(("gemma", "latent")) else 1e-12


def rounding_of(rank: int, names: list[str], bf16: bool) -> dict[str, tuple[float, float]]:
    """Errors of fp32 or bf16 against fp64: those of a shared model, and of one process."""
    found = {}
    for name in names:
        gold = prepare_model(built(name))
        one, shared = one_and_shared(built(name).float(), bf16=bf16)
        batch = pack_pairs(PAIRS, layout=layout_of(shared))
        wanted = {k: x.double() for k, x in values_of(gold, result_of(gold, batch))}
        worst = []
        for model in (shared, one):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                result = result_of(model, batch)
            if model is shared:
                summed(model)
            worst.append(max(apart(x.double(), wanted[k]) for k, x in values_of(model, result)))
        found[name] = worst[0], worst[1]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "bf16"), [(2, False), (4, False), (2, True)], ids=["2", "4", "2, bf16"]
)
def test_models_round_as_in_one_process(world, bf16):
    names = ["llama", "qwen3", "gemma3", "mistral"]
    for found in on_ranks(world, rounding_of, names, bf16):
        assert all(shared < 2 * one for shared, one in found.values()), found


# ----------------------------------------------------------------------------------------- options
def lora(model: Any) -> Any:
    adapted = add_lora(model, r=4, alpha=8, target_modules="all-linear")
    generator = torch.Generator().manual_seed(2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return adapted.double()


def of_options(rank: int) -> dict[str, float]:
    """Errors in fp64 of what saves memory, of other objectives and layouts."""
    found: dict[str, float] = {}

    def compare(what: str, models: tuple[Any, Any], pairs: Any = PAIRS, **options: Any) -> None:
        batch = pack_pairs(pairs, layout=layout_of(models[1]))
        found[what] = largest(errors(*models, batch, **options))

    memory = dict(gradient_checkpointing=True, mlp_tile_tokens=16, activation_offloading=True)
    compare("less memory", one_and_shared(built("mistral"), **memory))
    compare("checkpointed longrope", one_and_shared(built("longrope"), gradient_checkpointing=True))
    compare("packed", one_and_shared(built("mistral"), layout="packed"))
    compare("adapters", one_and_shared(lora(built("llama")), gradient_checkpointing=True))
    compare("experts", one_and_shared(built("mixtral")), router_aux_loss_coef=0.7)
    models = one_and_shared(built("qwen3"))
    for name in ("tdpo2", "simpo", "aot", "sft", "ipo"):
        objective = make_objective(name, beta=0.1)
        options: dict[str, Any] = {"objective": objective, "beta": None, "alpha": None}
        if not objective.needs_reference:
            options["ref_logp_S"] = None
        compare(name, models, **options) if not objective.needs_kl else None
        if objective.needs_kl:  # the reference's rows are cut as the policy's are
            other = one_and_shared(lora(built("qwen3")))
            batch = pack_pairs(PAIRS)
            rows = [reference_rows(x, batch) for x in models]
            wanted, shared = (
                result_of(x, batch, **{**options, "ref_logp_S": None}, reference=y)
                for x, y in zip(other, rows)
            )
            found[name] = max(
                apart(shared.loss.detach(), wanted.loss.detach()),
                apart(shared.metrics["kl/chosen"], wanted.metrics["kl/chosen"]),
            )
    return found


@pytest.mark.slow
def test_options_and_objectives():
    for found in on_ranks(2, of_options):
        assert largest(found) < 1e-12, found


# ------------------------------------------------------------------------------------ data parallel
def of_fsdp2(rank: int, world: int, size: int) -> dict[str, float]:
    """Errors of groups of ``size`` processes, a pair each, whose model FSDP2 divides over all."""
    from torch.distributed.device_mesh import init_device_mesh

    from fastdpo.model.shard import shard

    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("dp", "sp"))
    one, shared = prepare_model(built("qwen3")), built("qwen3")
    head.attach(shared)
    sequence_parallel.use(shared, mesh["sp"].get_group())
    shard(shared, init_device_mesh("cpu", (world,)))
    shared = prepare_model(shared, gradient_checkpointing=True)
    groups = world // size
    mine = range(rank // size, len(PAIRS), groups)
    count = -(-len(PAIRS) // groups)
    total = 0.0
    for i in range(count):  # one whose examples have run out goes on at no weight
        j = mine[i] if i < len(mine) else 0
        batch = pack_pairs([PAIRS[j]])
        given: dict[str, Any] = {"beta": 0.1, "alpha": 0.02, "num_pairs": len(PAIRS) / world}
        loss = packed_loss(shared, batch, REF[2 * j : 2 * j + 2], **given).loss
        (loss * (i < len(mine))).backward()
        total += loss.item() * (i < len(mine)) / world
    losses = torch.tensor(total, dtype=torch.float64)
    dist.all_reduce(losses)
    result = packed_loss(one, pack_pairs(PAIRS), REF, beta=0.1, alpha=0.02)
    result.loss.backward()
    found = {"loss": apart(losses / size, result.loss.detach())}
    wanted: dict[str, Any] = {name: p.grad for name, p in one.named_parameters()}
    parts: dict[str, Any] = {name: p.grad for name, p in shared.named_parameters()}
    return found | {name: apart(x.full_tensor(), wanted[name]) for name, x in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2), (4, 4)])
def test_with_fsdp2(world, size):
    for found in on_ranks(world, of_fsdp2, world, size):
        assert largest(found) < 1e-11, found


# ---------------------------------------------------------------------------------------- refusals
class Shift(nn.Module):
    """A layer's input plus that of the token before in its sequence: no attention, but exact."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        hidden = hidden + before * (position_ids > 0)[..., None]
        return self.layer(hidden, *args, position_ids=position_ids, **kwargs)


def message_of(f: Callable[[], Any]) -> str:
    try:
        f()
    except ValueError as error:
        return str(error)
    return "nothing"


def refused(rank: int) -> dict[str, str]:
    group = dist.group.WORLD
    uneven = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=3, num_key_value_heads=3,
        )
    )  # fmt: skip
    shifted = built("llama", torch.float32)
    shifted.model.layers[0] = Shift(shifted.model.layers[0])
    exact = prepare_model(copy.deepcopy(shifted), layout="packed")
    assert layout_of(exact) == "packed"
    sequence_parallel.use(shifted, group)
    padded, shared = built("llama", torch.float32), built("llama", torch.float32)
    for model in (padded, shared):
        sequence_parallel.use(model, group)
    shared = prepare_model(shared)
    batch = pack_pairs(PAIRS)

    def rows(h_TD: Tensor, **_: Any) -> Tensor:
        return h_TD

    found = {
        "heads": message_of(lambda: sequence_parallel.use(uneven, group)),
        "mixing": message_of(lambda: prepare_model(shifted, layout="packed")),
        "padded": message_of(lambda: prepare_model(padded, layout="padded")),
        "batch": message_of(lambda: packed_loss(shared, pack_pairs(PAIRS, layout="padded"), REF,
                                                beta=0.1)),
        "whole": message_of(lambda: head.packed_forward(shared, batch, rows)),
    }  # fmt: skip
    sequence_parallel.use(shared, None)
    head.packed_forward(shared, batch, rows)  # it has whole rows again
    return found


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_alike_on_all_processes():
    first, second = on_ranks(2, refused)
    assert first == second
    assert first["heads"] == (
        "sp_size=2: LlamaForCausalLM has 3 attention heads, which so many processes can't share "
        "evenly; sizes that can: 3"
    )
    assert "pairs are not isolated" in first["mixing"]
    assert "sequence parallel (sp_size=2) splits packed rows" in first["padded"]
    assert "sequence parallel (sp_size=2) splits packed rows" in first["batch"]
    assert "split the batch first" in first["whole"]
