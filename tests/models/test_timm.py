"""Whole models: timm's vision architectures, as unlike each other as they come, with a dynamic batch.

By default a few; `--all-models` takes every one. Some are left out because a rounding error alone changes their results
with random weights: efficientnetv2_rw_t, fbnetv3_b.
"""

import pytest
from harness import zoo

timm = pytest.importorskip("timm", reason="timm is not installed")

QUICK = {"convnextv2_atto", "efficientvit_b0", "pvt_v2_b0", "resnest14d"}
MODELS = {
    64: """
        caformer_s18 convformer_s18 convmixer_768_32 convnextv2_atto cspdarknet53 cspresnet50 dla34 dpn48b
        eca_nfnet_l0 edgenext_xx_small efficientvit_b0 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcresnet33ts
        gernet_s ghostnetv3_100 hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 mambaout_femto
        mixnet_s mobilenetv4_conv_small mobileone_s0 mobilevit_s mobilevitv2_050 nextvit_small nfnet_l0
        poolformer_s12 pvt_v2_b0 rdnet_tiny regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s
        resnest14d resnetv2_50x1_bit rexnet_100 selecsls42 skresnet18 starnet_s1 tinynet_e tresnet_m vovnet39a
        xception41
    """.split(),
    96: ["inception_resnet_v2", "inception_v4", "nasnetalarge"],
    224: """
        beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny davit_tiny
        efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny gmlp_s16_224 haloregnetz_b
        hiera_tiny_224 levit_128s mixer_s32_224 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny pit_ti_224
        resmlp_12_224 samvit_base_patch16_224 sequencer2d_s shvit_s1 swiftformer_xs
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 twins_pcpvt_small
        visformer_tiny vit_relpos_small_patch16_224 vit_small_patch16_dinov3 vit_tiny_patch16_224 volo_d1_224
        xcit_nano_12_p16_224
    """.split(),
    240: ["crossvit_9_240"],
    256: [
        "bat_resnext26ts",
        "botnet26t_256",
        "fastvit_mci0",
        "halonet26t",
        "hieradet_small",
        "lambda_resnet26rpt_256",
        "mobilenetv4_hybrid_medium",
        "swinv2_tiny_window8_256",
        "vit_so150m_patch16_reg4_map_256",
    ],
    512: ["csatv2"],
}
ROWS = [
    zoo.Row(name, lambda name=name: timm.create_model(name), zoo.images(3, size, size), quick=name in QUICK)
    for size, names in MODELS.items()
    for name in names
]


def pytest_generate_tests(metafunc):
    zoo.parametrize(metafunc, ROWS)


def test_architecture(row, device):
    zoo.check_row(row, device)
