"""The folded autoencoder: latents of the source autoencoder, with four cells folded into one."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it

from training import flux_vae, vae

pytestmark = pytest.mark.slow


def test_it_shrinks_twice_as_much_into_four_times_the_channels() -> None:
    """64 × 64 pixels become 4 × 4 cells of 16 channels, and are decoded again.

    After `relaid` the encoder adds no noise.
    """
    model = vae.relaid(flux_vae.build(vae.build()), torch.eye(16))
    with torch.no_grad():
        posterior = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist
        drawn = model.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, 16, 4, 4)
    assert posterior.std.max() < 1e-4
    assert drawn.shape == (1, 3, 64, 64)


def test_both_ends_are_the_source_s_own() -> None:
    """The finest blocks keep their weights, so only the coarsest must be trained."""
    source = vae.build()
    made = flux_vae.build(source).state_dict()
    weights = source.state_dict()
    for name, twin in (
        ("encoder.down_blocks.2.resnets.0.conv1.weight",) * 2,
        ("decoder.up_blocks.3.resnets.1.conv2.weight", "decoder.up_blocks.4.resnets.1.conv2.weight"),
        ("decoder.conv_out.weight",) * 2,
    ):
        assert torch.equal(made[twin], weights[name])


def test_its_losses_compare_with_the_source() -> None:
    """Each loss is a number with a gradient to the model."""
    source = vae.build().requires_grad_(False)
    model, pictures = flux_vae.build(source), torch.zeros(1, 3, 64, 64)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = [flux_vae.feature_loss(model, source, latents), flux_vae.vae_loss(model, source, pictures)]
    torch.stack(losses).sum().backward()
    assert all(loss > 0 for loss in losses)
    assert F.pixel_unshuffle(latents, 2).shape == (1, 16, 4, 4)
    assert model.decoder.up_blocks[0].resnets[0].conv1.weight.grad is not None


def test_a_stretch_is_laid_into_both_ends() -> None:
    """The copy encodes to scaled latents, and decodes them to the same images."""
    model = flux_vae.build(vae.build())
    forth = torch.diag(torch.linspace(0.5, 2, 16)) + 0.1
    copy, pictures = vae.relaid(model, forth), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, stretched = (each.encode(pictures).latent_dist.mean for each in (model, copy))
        drawn, again = model.decode(own).sample, copy.decode(stretched).sample
    torch.testing.assert_close(stretched, torch.einsum("oc,nchw->nohw", forth, own), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, drawn, atol=1e-3, rtol=1e-3)


def test_evened_latents_spread_alike() -> None:
    """Fully applied, every direction has unit variance; partly applied, variances come closer to one another."""
    latents = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    latents = latents * torch.tensor([4.0, 1.0, 0.25]).view(1, 3, 1, 1)
    for share, spread in ((1.0, 1.0), (0.5, 4.0)):
        forth = vae.evening(latents, share, 1e-6)
        deviations = torch.einsum("oc,nchw->nohw", forth, latents).std((0, 2, 3))
        assert float(deviations.max() / deviations.min()) == pytest.approx(spread, rel=0.1)
