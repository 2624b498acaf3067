"""The search over layouts: what it tries, what it skips, what it says; compiling is faked."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from moejax import search
from moejax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, TrainConfig
from moejax.moe_config import MoEConfig
from moejax.topology import parse_topology

CONFIG = Config(
    model=ModelConfig(num_layers=2, d_model=64, dtype="bfloat16"),
    moe=MoEConfig(num_experts=4, expert_hidden=32, capacity_factor=None),
    data=DataConfig(sequence_length=32),
    train=TrainConfig(batch_size=16),
)
POD = parse_topology("v5e:2x4")


@pytest.fixture(scope="module")
def found():
    return search.layouts(CONFIG, POD, 8)


def test_layouts_use_all_devices_and_are_allowed(found):
    assert len({tuple(layout.words) for layout in found}) == len(found)
    for layout in found:
        assert layout.config.mesh.num_devices == 8
        layout.config.check_mesh(layout.config.mesh)
    sizes = {
        axis: {getattr(layout.config.mesh, axis) for layout in found}
        for axis in ("data", "fsdp", "expert_fsdp", "expert", "tensor")
    }
    assert sizes["fsdp"] == sizes["data"] == {1, 2, 4, 8}
    assert sizes["expert"] == sizes["expert_fsdp"] == {1, 2, 4}  # of 4 experts
    assert sizes["tensor"] == {1, 2}  # of 2 key/value heads
    assert {layout.config.moe.transport for layout in found} > {"gather", "ragged", "all_to_all"}
    assert {layout.config.train.accumulation for layout in found} > {1, 2}
    assert [layout.seconds for layout in found] == sorted(layout.seconds for layout in found)


def _layout(found, **wanted):
    """Returns the only layout with these words."""
    words = [f"{key.replace('__', '.')}={value}" for key, value in wanted.items()]
    (layout,) = [one for one in found if set(words) <= set(one.words)]
    return layout


def test_the_paper_model_knows_what_makes_a_step_larger_or_slower(found):
    plain = {
        "mesh__data": 1,
        "mesh__fsdp": 2,
        "mesh__expert": 4,
        "model__remat": "none",
        "train__accumulation": 1,
        "moe__transport": "ragged",
    }
    base = _layout(found, **plain)
    full = _layout(found, **plain | {"model__remat": "full"})
    assert full.bytes < base.bytes
    assert full.compute == pytest.approx(base.compute * 4 / 3)
    split = _layout(found, **plain | {"train__accumulation": 2})
    assert split.bytes < base.bytes
    assert split.links > base.links  # weights are gathered twice
    gathered = _layout(found, **plain | {"moe__transport": "gather"})
    assert gathered.links > base.links
    data = _layout(found, **plain | {"mesh__data": 2, "mesh__fsdp": 1})
    assert data.bytes > base.bytes  # the state is whole on both


def _count(config, topology=POD):
    found = search.layouts(config, topology, 8)
    for layout in found:
        layout.config.check_mesh(layout.config.mesh)
    return len(found)


def test_capacity_groups_stay_whole_on_every_layout():
    """16 sequences in groups of 2: at most 8 microbatches, on a mesh that does not split them."""
    heads = dataclasses.replace(CONFIG.model, num_heads=8, num_kv_heads=8)
    grouped = dataclasses.replace(
        CONFIG, model=heads, moe=dataclasses.replace(CONFIG.moe, group_sequences=2)
    )
    found = search.layouts(grouped, POD, 8)
    steps = {one.config.train.accumulation for one in found if one.config.mesh.tensor == 8}
    assert steps == {1, 2, 4, 8}
    assert _count(grouped) < _count(dataclasses.replace(grouped, moe=CONFIG.moe))


def test_a_batch_that_only_some_meshes_split():
    """18 sequences on 8 devices: over 1 or 2 token shards, so tensor is 8 or 4."""
    heads = dataclasses.replace(CONFIG.model, num_heads=8, num_kv_heads=8)
    odd = dataclasses.replace(CONFIG, model=heads, train=TrainConfig(batch_size=18))
    found = search.layouts(odd, POD, 8)
    assert {one.config.mesh.tensor for one in found} == {4, 8}
    assert {one.config.train.accumulation for one in found} == {1, 2, 3, 6, 9, 18}


def test_a_policy_that_keeps_what_was_delivered_sends_it_twice_and_holds_it():
    """2 MoE layers of gather over 4: 1.5 * 2 * 64 rows of 64, and dense matrices, in bfloat16."""
    mesh = MeshConfig(data=1, fsdp=2, expert=4)
    rows = search.placements(CONFIG, MeshConfig(data=1))

    def on_paper(remat, mesh=mesh):
        model = dataclasses.replace(CONFIG.model, remat=remat)
        moe = dataclasses.replace(CONFIG.moe, transport="gather")
        changed = dataclasses.replace(CONFIG, mesh=mesh, model=model, moe=moe)
        exchange, *others = search._sent(changed, POD, rows["parameters"])
        return search._bytes(changed, POD, rows), exchange[0], [sent for sent, _ in others]

    full, keeping, none = (on_paper(remat) for remat in ("full", "exchange", "none"))
    model = CONFIG.model
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    kept = 2 * 2 * (192 * 64 + heads * 64)
    assert keeping[0] - full[0] == kept
    assert 5 * keeping[1] == 5 * none[1] == 4 * full[1]  # the way back is not repeated
    assert keeping[2] == full[2] != none[2]  # weights are gathered again all the same
    both = on_paper("exchange_and_dots_with_no_batch_dims")
    assert both[0] - on_paper("dots")[0] == kept
    alone = MeshConfig(data=1, fsdp=8, expert=1)
    assert on_paper("exchange", alone)[0] == on_paper("full", alone)[0]  # nothing is exchanged


def test_attention_of_deepseek_v3_on_paper():
    """128 heads with queries and keys of 128 + 64 and values of 128."""
    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = ModelConfig(num_heads=128, attention="latent", **widths)
    assert search._attention_numbers(model) == 128 * (192 + 192 + 128)
    grouped = ModelConfig(num_heads=32, num_kv_heads=8, head_dim=128)
    assert search._attention_numbers(grouped) == (32 + 8 + 8) * 128


@pytest.mark.parametrize(("chunk", "logits"), [(None, 64), (1024, 64), (16, 16)])
def test_logits_on_paper_are_those_of_a_chunk(chunk, logits):
    """2 sequences of 32 tokens a device, D 64, 132 of 264 columns of a bfloat16 unembedding."""
    model = dataclasses.replace(CONFIG.model, vocab_size=264, loss_chunk=chunk)
    mesh = MeshConfig(data=8, tensor=2)
    config = dataclasses.replace(CONFIG, model=model, mesh=mesh)
    assert search._loss_bytes(config) == 132 * (2 * 4 * logits + (2 + 4) * 64)


def _record(layout, *, fits=True, seconds=1.0, links=0.1):
    return {
        "fits": fits,
        "peak_bytes": 2**30 if fits else 2**35,
        "memory_limit": POD.chip.memory,
        "step_seconds_low": seconds,
        "step_seconds_high": 2 * seconds,
        "roofline": {"compute": 1.0, "memory": 0.5, "links": links},
    }


@pytest.fixture
def compiled(monkeypatch):
    """Fakes the compiler: the first does not fit, the second fails, the third is the best."""
    seen = []

    def make_plan(config, topology):
        seen.append(config)
        if len(seen) == 2:
            raise ConfigError("XLA does not compile this step")
        return len(seen)

    answers = {1: {"fits": False}, 3: {"seconds": 1.0}, 4: {"seconds": 1.5, "links": 2.0}}
    monkeypatch.setattr(search, "make_plan", make_plan)
    monkeypatch.setattr(search, "plan_record", lambda n: _record(None, **answers[n]))
    return seen


def test_the_best_are_compiled_ranked_and_kept(compiled, tmp_path):
    quiet = Console(file=io.StringIO(), width=200)
    tried, found = search.search(CONFIG, POD, 8, tmp_path, quiet)
    assert compiled == [layout.config for layout in found[: search.TRIES]]
    assert [t.layout for t in tried[:2]] == [found[2], found[3]]
    assert not tried[2].fits
    again, _ = search.search(CONFIG, POD, 8, tmp_path, quiet)
    assert len(compiled) == search.TRIES  # from the cache
    assert [t.record for t in again] == [t.record for t in tried]
    out = io.StringIO()
    given = ["configs/a.py", "seed=3", "mesh.fsdp=16"]
    search.show_search(tried, found, POD, given, Console(file=out, width=400))
    text = out.getvalue()
    command = "moejax train configs/a.py seed=3 --workdir runs/planned " + " ".join(found[2].words)
    assert command in text
    assert "50% slower; links 2 s against 0.1 s" in text
    assert "does not fit, by 16.2 GiB" in text
    assert "XLA does not compile this step" in text
    assert f"of {len(found)} layouts 0 do not fit on paper" in text


def test_an_interrupted_search_goes_on_where_it_was(monkeypatch, compiled, tmp_path):
    quiet = Console(file=io.StringIO())
    whole = search.make_plan

    def interrupt(config, topology):
        if len(compiled) == 2:
            raise KeyboardInterrupt
        return whole(config, topology)

    monkeypatch.setattr(search, "make_plan", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search.search(CONFIG, POD, 8, tmp_path, quiet)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(search, "make_plan", whole)
    search.search(CONFIG, POD, 8, tmp_path, quiet)
    assert len(compiled) == search.TRIES


def test_results_are_kept_by_what_they_depend_on(found):
    one, other = (dataclasses.replace(CONFIG, seed=seed) for seed in (0, 1))
    assert search._key(one, POD) == search._key(CONFIG, POD)
    assert search._key(one, POD) != search._key(other, POD)
    assert search._key(one, POD) != search._key(one, parse_topology("v5e:4x4"))
    assert search._key(one, POD) != search._key(one, dataclasses.replace(POD, fraction=0.5))


def test_nothing_to_lay_out_says_what_would_be(tmp_path):
    odd = dataclasses.replace(
        CONFIG, train=TrainConfig(batch_size=3), model=ModelConfig(num_heads=1, num_kv_heads=1)
    )
    with pytest.raises(ConfigError, match=r"use a batch that is a multiple of 8$"):
        search.search(odd, POD, 8, tmp_path)
    moe = dataclasses.replace(CONFIG.moe, group_sequences=3)
    with pytest.raises(ConfigError, match=r"use a batch that is a multiple of 24$"):
        search.search(dataclasses.replace(odd, moe=moe), POD, 8, tmp_path)


def test_nothing_that_fits_says_how_much_is_missing(tmp_path):
    moe = dataclasses.replace(CONFIG.moe, num_experts=4096, expert_hidden=2**16)
    large = dataclasses.replace(CONFIG, moe=moe)
    with pytest.raises(ConfigError, match=r"the smallest needs .* GiB a device, .* use more chips"):
        search.search(large, POD, 8, tmp_path)


def test_the_search_json_has_every_try(monkeypatch, compiled, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(search, "topology_devices", lambda topology: [None] * 8)
    monkeypatch.setattr(search, "output_console", lambda: Console(file=io.StringIO()))
    assert search.search_plan(CONFIG, POD, ["configs/a.py"], tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["compiled"]
    assert len(rows) == search.TRIES
    assert rows[0]["step_seconds_low"] == 1.0
    assert (tmp_path / "moejax" / "plans").is_dir()


def test_slices_are_joined_by_data_alone_and_by_their_network():
    pod = parse_topology("v5e:2x4:2")
    found = search.layouts(CONFIG, pod, 16)
    assert {layout.config.mesh.data for layout in found} == {2, 4, 8, 16}
    mesh = MeshConfig(data=2, fsdp=8)
    assert search._speed(pod, mesh, "data") == pod.chip.network == 3.125e9
    assert search._speed(pod, mesh, "fsdp") == 2 * pod.chip.link


def test_links_of_gpus_end_at_the_host():
    pod = parse_topology("h100:2x8")
    mesh = MeshConfig(data=1, fsdp=2, expert=8)
    assert search._speed(pod, mesh, "expert") == pod.chip.link
    assert search._speed(pod, mesh, "fsdp") == pod.chip.network


def test_gpus_send_over_the_network_only_what_leaves_their_host():
    pod = parse_topology("h100:2x8")
    link, network = pod.chip.link, pod.chip.network
    both = MeshConfig(data=1, expert=16)
    assert search._speed(pod, both, "expert") == min(link, 8 * network)  # a ring over all 8 of each
    seconds = search._exchange_seconds(pod, both, "all_to_all", 15e9)
    assert seconds == pytest.approx(max(7e9 / link, 8e9 / network))  # 1 GB to each of 15
    one = search._exchange_seconds(pod, MeshConfig(fsdp=2, expert=8), "ragged", 7e9)
    assert one == pytest.approx(7e9 / link)
    split = MeshConfig(data=1, fsdp=1, expert=8, tensor=2)  # 4 of an expert group's 8 at a host
    found = search._exchange_seconds(pod, split, "all_to_all", 7e9)
    assert found == pytest.approx(max(3e9 / link, 4e9 / network))
