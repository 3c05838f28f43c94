import sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
import layerstream.model.families as fam
src=open("/tmp/scratch-core/try.py").read()
ns={}
sys.argv=["x","none","layers"]
exec(src.split("for name in (sys.argv")[0], ns)
build=ns["build"]; tok=ns["tok"]
ns["mp"].undo()
from tests.harness import *
from tests.reference.test_drafts import Guesser
from tests.pretend import pretend_cudas
from layerstream.setup.assembly import assemble
from layerstream.setup.self_check import step_greedily
import layerstream.model.skeleton as sk
fam.is_tested=lambda c: True
@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink_units(monkeypatch)
    with pretend_cudas(monkeypatch, 2) as d: yield d
K=["gemma4","gemma4moe","gemma4e","gemma3n","qwen25vl","gemma4vl"]
@pytest.mark.parametrize("mode",["device-resident","device-host","device-disk"])
@pytest.mark.parametrize("kind",K)
def test_device(kind,mode,tmp_path):
    ref=build(kind,tmp_path); add_tokenizer(tmp_path,tok)
    prompts=[draw_prompt(n) for n in (150,5,67)]
    assert_equals(run_greedily(config_for(tmp_path,mode),prompts),ref,prompts,1e-4)
@pytest.mark.parametrize("kind",["gemma4e","gemma3n"])
def test_several(kind,tmp_path):
    ref=build(kind,tmp_path); add_tokenizer(tmp_path,tok)
    prompts=[draw_prompt(n) for n in (150,5,67)]
    for mode in ("resident","host"):
        assert_equals(run_greedily(devices_config(tmp_path,mode,"balanced",2),prompts),ref,prompts,1e-4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode",["resident","layers","cut"])
@pytest.mark.parametrize("kind",K)
def test_alone(kind,mode,dtype,tmp_path):
    build(kind,tmp_path); add_tokenizer(tmp_path,tok)
    config=replace(config_for(tmp_path,mode),dtype=dtype)
    prompt=draw_prompt(45); others=[draw_prompt(n) for n in (80,3,21)]
    alone=run_greedily(config,[prompt]); among=run_greedily(config,[others[0],prompt,*others[1:]])
    assert torch.equal(alone.logits[0],among.logits[1])
@pytest.mark.parametrize("mode",["layers","device-host"])
@pytest.mark.parametrize("kind",["gemma4","gemma4e","gemma3n"])
def test_drafts(kind,mode,tmp_path):
    build(kind,tmp_path); add_tokenizer(tmp_path,tok)
    parts=assemble(config_for(tmp_path,mode),None)
    prompts=[draw_prompt(n) for n in (45,3,70)]
    try:
        tokens,logits=step_greedily(parts,prompts,14); before=parts.step.num_sweeps
        g=Guesser(tokens,0); found,fl=step_greedily(parts,prompts,14,g)
        assert found==tokens and all(torch.equal(a,b) for a,b in zip(fl,logits))
        assert parts.step.num_sweeps-before<before
    finally: parts.close()
