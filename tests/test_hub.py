"""The Hub's tree: rewritten modules alone, and what `make hub` builds, as `kernels` loads it.

`make hub` names its tree in ATTNFAST_HUB. Everything runs in processes of its own, outside of the
repository, whose kernels/ would hide the library of that name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from attnfast import ops
from tools import hub

ROOT = Path(__file__).resolve().parent.parent
TREE = Path(os.environ.get("ATTNFAST_HUB", "")).resolve()
LIBRARIES = ROOT / "build" / "hub-check"  # kernels, and a transformers that takes it
needs_hub = pytest.mark.skipif(
    "ATTNFAST_HUB" not in os.environ, reason="the Hub's tree: tested by `make hub`"
)

SAME = """
def same(module, backend, **options):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for name in (backend, "reference"):
        out = module.attention(q, k, v, causal=True, backend=name, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference)
"""
WITHOUT_ATTNFAST = """
import sys
sys.modules["attnfast"] = None  # its import fails
import torch
"""


def run(folder: Path, script: str, *arguments: object, **variables: str) -> str:
    """What a script prints in a process of its own, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(LIBRARIES)} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ALONE = f"""{WITHOUT_ATTNFAST}{SAME}
from importlib.util import module_from_spec, spec_from_file_location
folder, root, backend = sys.argv[1:]
spec = spec_from_file_location("some_name", folder + "/__init__.py")
module = sys.modules["some_name"] = module_from_spec(spec)
spec.loader.exec_module(module)
same(module, backend, window=(9, 0))
files = [getattr(x, "__file__", None) or "" for x in sys.modules.values()]
print([x for x in files if x.startswith((root + "/attnfast", root + "/kernels"))])
print(sum(x.startswith(folder) for x in files) > 20, module.flash_attn_func.__module__)
"""


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_rewritten_modules_need_no_attnfast(backend: str, tmp_path: Path) -> None:
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if ops.MISSING:
        pytest.skip(ops.MISSING)
    library = Path(os.environ.get("ATTNFAST_NATIVE") or Path(ops.__file__).with_name("_native.so"))
    hub.write(tmp_path, hub.NATIVE, ops.NAMESPACE, "cpu", library)  # no other attnfast in there
    folder = tmp_path / "build" / hub.NATIVE
    printed = run(tmp_path, ALONE, folder, ROOT, backend, TRITON_INTERPRET="1")
    assert printed.split() == ["[]", "True", "some_name.integrations.flash_attn"]


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        ("kernels/a.py", "from attnfast.call import X", "from ..call import X"),
        ("kernels/a.py", "if 1:\n    from attnfast import b", "if 1:\n    from .. import b"),
        ("a.py", "from attnfast.nn.cache import X", "from .nn.cache import X"),
        ("a.py", "from attnfaster import X\nfrom .b import Y", None),
        ("ops.py", 'NAMESPACE = "attnfast"  # of', 'NAMESPACE = "_unique"  # of'),
    ],
)
def test_imports_become_relative(inside: str, text: str, expected: str | None) -> None:
    assert hub.rewritten(Path(inside), text, "_unique") == (expected or text)


@pytest.mark.parametrize("text", ["import attnfast.call", "import kernels.rows as rows"])
def test_other_imports_of_ours_are_refused(text: str) -> None:
    with pytest.raises(AssertionError, match=r"a\.py must import ours relatively, got"):
        hub.rewritten(Path("a.py"), text, "_unique")


def test_the_digest_is_that_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "cpu" / "a.h"
    source.parent.mkdir(parents=True)
    digests = []
    for text in ("1", "2", "1"):
        source.write_text(text)
        digests.append(hub.digest())
    assert digests[0] == digests[2] != digests[1]


LOADED = f"""{WITHOUT_ATTNFAST}{SAME}
from pathlib import Path
from kernels import Metadata, get_local_kernel, get_loaded_kernels
tree, variant = Path(sys.argv[1]), sys.argv[2]
if variant:
    kernel = get_local_kernel(tree / "build" / variant)  # its own choice would be the other
else:
    kernel = get_local_kernel(tree)
same(kernel, "reference" if variant else "cpu")
loaded, = get_loaded_kernels()
assert loaded.module is kernel and kernel.__name__ == kernel.ops.NAMESPACE == loaded.metadata.id
print(Path(kernel.__file__).parent.name, loaded.metadata.id, kernel.ops.MISSING is None)
"""


@needs_hub
@pytest.mark.parametrize("variant", ["", hub.UNIVERSAL])
def test_kernels_loads_it(variant: str, tmp_path: Path) -> None:
    name, identity, native = run(tmp_path, LOADED, TREE, variant).split()
    assert name == (variant or hub.NATIVE)
    assert identity == f"_attnfast_{'universal' if variant else 'cpu'}_{hub.digest()}"
    assert native == str(not variant)


BESIDE = f"""
import sys
import torch
import attnfast
{SAME}
from kernels import get_local_kernel
kernel = get_local_kernel(__import__("pathlib").Path(sys.argv[1]))
assert kernel.attention is not attnfast.attention
assert kernel.ops.cpu_isa() == attnfast.ops.cpu_isa()
for module in (attnfast, kernel):
    same(module, "cpu", softcap=20.0)
torch.manual_seed(0)
q = torch.randn(1, 2, 40, 16, requires_grad=True)
from torch.utils.flop_counter import FlopCounterMode
for module in (attnfast, kernel):
    with FlopCounterMode(display=False) as counter:
        module.attention(q, q, q).sum().backward()
    print(counter.get_total_flops())
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q), module.attention(q, q, q))
"""


@needs_hub
def test_it_lives_beside_an_installed_attnfast(tmp_path: Path) -> None:
    ours, theirs = map(int, run(tmp_path, BESIDE, TREE).split())
    assert ours == theirs == 2 * 7 * 2 * 40 * 40 * 16  # seven products of two heads


MODEL = f"""{WITHOUT_ATTNFAST}
import copy
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=100,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, use_cache=True)
ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
masks = {{"whole": torch.ones(3, 12), "left": torch.ones(3, 12), "right": torch.ones(3, 12)}}
masks["left"][1, :5] = masks["right"][1, 7:] = 0
calls = []
for Model, config in ((LlamaForCausalLM, LlamaConfig(**sizes)),
                      (MistralForCausalLM, MistralConfig(**sizes, sliding_window=4))):
    torch.manual_seed(0)
    eager = Model._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    hub = Model._from_config(copy.deepcopy(config), attn_implementation="some-org/attnfast").eval()
    hub.load_state_dict(eager.state_dict())
    kernel, = (x for name, x in sys.modules.items() if name.startswith("_attnfast_cpu_")
               and "." not in name)
    module = sys.modules[kernel.__name__ + ".functional"]
    if not hasattr(module, "counted"):
        module.counted = True
        select = module.dispatch.select
        module.dispatch.select = lambda *a, **k: calls.append(select(*a, **k)) or calls[-1]
    for name, mask in masks.items():
        mask, kept = mask.long(), mask.bool()
        results = []
        for model in (eager, hub):
            model.zero_grad()
            logits = model(ids, attention_mask=mask).logits
            logits[kept].square().mean().backward()
            results.append([logits[kept], *(x.grad for x in model.parameters())])
            assert bool(calls) == (model is hub)
            if name != "right":
                tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
                results[-1].append(tokens)
        for expected, got in zip(*results):
            torch.testing.assert_close(got, expected)
        print(len(calls), *{{row.name for row in calls}})
        calls.clear()
"""


@needs_hub
def test_a_model_takes_it_by_its_name(tmp_path: Path) -> None:
    """Forward, backward, padding on either side and generation are those of eager attention."""
    override = {"LOCAL_KERNELS": f"some-org/attnfast={TREE}", "HF_HUB_OFFLINE": "1"}
    printed = run(tmp_path, MODEL, **override).splitlines()
    layers, steps = 2, 6
    assert printed == [f"{layers * x} cpu" for x in (1 + steps, 1 + steps, 1)] * 2


@needs_hub
def test_the_library_asks_for_no_newer_libc() -> None:
    library = TREE / "build" / hub.NATIVE / "_native.so"
    needs = hub.needed(library)
    assert needs["GLIBC"] >= (2, 14)
    card = (TREE / "README.md").read_text()
    assert hub.shown(needs) in card
    assert f"({hub.manylinux(needs)})" in card
