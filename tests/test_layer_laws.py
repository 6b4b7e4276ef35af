"""The laws of layers: sound layers pass, and each law fails on a layer that breaks it on purpose."""

import pytest
import torch
import torch.nn.functional as F

from saccade import Attention, LinearAttention, masks
from saccade.nn import MultiHead
from saccade.study import laws
from saccade.systems.base import LayerSystem, Promises


class Sound(LayerSystem):
    promises = Promises(exponent=2.0)

    def layer(self, place):
        return Attention(mask=masks.Causal())


class Linear(LayerSystem):
    promises = Promises(exponent=1.0)

    def layer(self, place):
        return LinearAttention(lambda x: F.elu(x) + 1, normalize=True)


class Changed(MultiHead):
    """One step of it is broken by what is handed over."""

    def __init__(self, *args, merge=None, attend=None, **named):
        super().__init__(*args, **named)
        self.broken_merge, self.broken_attend = merge, attend

    def attend(self, q, k, v, **given):
        out = super().attend(q, k, v, **given)
        return out if self.broken_attend is None else self.broken_attend(self, out, given)

    def merge(self, out, x):
        return super().merge(out, x) if self.broken_merge is None else self.broken_merge(self, out, x)


def broken(spec=None, exponent=2.0, **how):
    class Broken(LayerSystem):
        promises = Promises(exponent=exponent)

        def layer(self, place):
            return Changed(spec or Attention(mask=masks.Causal()), place.width, place.heads, **how)

    return Broken


def statuses(system):
    return {result.law: (result.status, result.detail) for result in laws.check(system)}


@pytest.mark.parametrize("system", [Sound, Linear])
def test_sound_layers_pass(system):
    found = statuses(system)
    assert len(found) == 8
    wrong = {law: told for law, told in found.items() if told[0] == "failed"}
    assert not wrong
    assert [law for law, (status, _) in found.items() if status == "skipped"] == ["forms agree"] * (system is Sound)


def ahead(self, out, x):
    return self.out(out.transpose(1, 2).flatten(2)) + x.mean(1, keepdim=True)


def counting(self, out, given):
    cache = given.get("cache")
    return out * (1 if cache is None else 1.01)


def by_form(self, out, given):
    return out * (1.01 if given.get("form") == "recurrent" else 1)


def cut(self, out, x):
    return self.out((out * 0).transpose(1, 2).flatten(2)) + x


def neighbours(self, out, x):
    return self.out(out.transpose(1, 2).flatten(2)) + x.mean(0, keepdim=True)


def rounded(self, out, x):
    return self.out(out.transpose(1, 2).flatten(2)) * (1 if x.dtype == torch.float64 else 1.2)


@pytest.mark.parametrize(
    "law, system",
    [
        ("nothing flows from the future", broken(merge=ahead)),
        ("decoding equals prefill", broken(attend=counting)),
        ("forms agree", broken(LinearAttention(), attend=by_form)),
        ("trains every part", broken(merge=cut)),
        ("a batch equals each alone", broken(merge=neighbours)),
        ("low precision is near", broken(merge=rounded)),
        ("operations grow as promised", broken(exponent=1.0)),
    ],
)
def test_a_broken_layer_is_found(law, system):
    status, detail = statuses(system)[law]
    assert status == "failed", detail


def test_a_setting_that_is_lost_is_found():
    class Forgetful(Sound):
        def __init__(self, size=3):
            pass

    assert statuses(Forgetful)["settings are kept"][0] == "failed"
