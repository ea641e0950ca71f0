"""What `remove` and a failing `apply` leave behind: nothing (acceptance 5, section 12)."""

from __future__ import annotations

import copy

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied, apply
from pared_hooks import Patch

CONFIG = DaToConfig(policy=Policy((FULL, 1, 3, 12), 0.4), min_tokens=1)


def fingerprint(model):
    """Everything about the modules of `model` that a patch could leave changed."""
    return {
        name: (type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("backend", ["hooks", "split"])
@torch.no_grad()
def test_remove_restores_attributes_state_dict_and_outputs(sd_unet, calls, backend):
    inputs = calls(2)
    before, keys = fingerprint(sd_unet), list(sd_unet.state_dict())
    expected = [sd_unet(*call).sample for call in inputs]
    handle = apply(sd_unet, CONFIG.replace(backend=backend))
    assert list(sd_unet.state_dict()) == keys
    assert not torch.equal(sd_unet(*inputs[0]).sample, expected[0])
    sd_unet(*inputs[1])
    handle.remove()
    handle.remove()
    assert fingerprint(sd_unet) == before
    assert list(sd_unet.state_dict()) == keys
    for call, output in zip(inputs, expected, strict=True):
        assert torch.equal(sd_unet(*call).sample, output)


def test_remove_restores_dit_and_controlnet(dit, pipeline):
    before = fingerprint(dit)
    apply(dit, CONFIG.replace(policy=Policy((FULL, 1, 3), 0.4))).remove()
    assert fingerprint(dit) == before

    pipe, run = pipeline("StableDiffusionControlNet", steps=5)
    before = fingerprint(pipe.unet), fingerprint(pipe.controlnet)
    with applied(pipe, CONFIG.replace(policy=Policy((FULL, 1, 0, 2, 1), 0.4))):
        pipe(**run)
    assert (fingerprint(pipe.unet), fingerprint(pipe.controlnet)) == before


def test_stores_are_dropped_with_the_handle(sd_unet, calls):
    handle = apply(sd_unet, CONFIG)
    with torch.no_grad():
        sd_unet(*calls(1)[0])
    assert handle.stats()["memory_bytes"] > 0
    handle.remove()
    assert handle.stats()["memory_bytes"] == 0


def test_a_failure_at_any_registration_leaves_the_pipeline_as_it_was(pipeline, monkeypatch):
    pipe, _ = pipeline("StableDiffusionControlNet")
    config = DaToConfig(policy=Policy((FULL, 1, 2, 4), 0.4), min_tokens=1)
    before = fingerprint(pipe.unet), fingerprint(pipe.controlnet)
    done, fail_at = 0, None

    def failing(method):
        def wrapper(self, *args, **kwargs):
            nonlocal done
            done += 1
            if done == fail_at:
                raise RuntimeError("injected")
            return method(self, *args, **kwargs)

        return wrapper

    for name in ("claim", "wrap_forward", "on_remove"):
        monkeypatch.setattr(Patch, name, failing(getattr(Patch, name)))
    apply(pipe, config).remove()
    registrations = done
    assert registrations > 10
    for k in range(1, registrations + 1):
        done, fail_at = 0, k
        with pytest.raises(RuntimeError, match="injected"):
            apply(pipe, config)
        assert (fingerprint(pipe.unet), fingerprint(pipe.controlnet)) == before


@torch.no_grad()
def test_copies_and_saved_models_are_unpatched(sd_unet, calls, tmp_path):
    call = calls(1)[0]
    expected = sd_unet(*call).sample
    with applied(sd_unet, CONFIG):
        sd_unet(*call)
        assert torch.equal(copy.deepcopy(sd_unet)(*call).sample, expected)
        sd_unet.save_pretrained(tmp_path)
    assert torch.equal(type(sd_unet).from_pretrained(tmp_path)(*call).sample, expected)
