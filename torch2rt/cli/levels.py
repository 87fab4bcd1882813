"""How torch functions without a converter are converted: by `tests/harness/plain_functions.py`."""

TORCH = "2.15"

MEASURED = {
    "aten": """
        torch.Tensor.cfloat torch.Tensor.sum_to_size torch.adjoint torch.alias_copy
        torch.binary_cross_entropy_with_logits torch.column_stack torch.combinations torch.corrcoef
        torch.cosine_embedding_loss torch.cov torch.cross torch.cumulative_trapezoid torch.diag torch.diagflat
        torch.diff torch.dist torch.dsplit torch.dstack torch.expand_copy torch.fft.fft torch.fft.fft2
        torch.fft.fftn torch.fft.fftshift torch.fft.hfft torch.fft.hfft2 torch.fft.hfftn torch.fft.ifft
        torch.fft.ifft2 torch.fft.ifftn torch.fft.ifftshift torch.fft.ihfft torch.fft.ihfft2 torch.fft.ihfftn
        torch.fft.irfft torch.fft.irfft2 torch.fft.irfftn torch.fft.rfft torch.fft.rfft2 torch.fft.rfftn
        torch.fliplr torch.flipud torch.frobenius_norm torch.gradient torch.hinge_embedding_loss torch.hsplit
        torch.hstack torch.isclose torch.kl_div torch.ldexp torch.linalg.diagonal torch.linalg.vander
        torch.logaddexp2 torch.margin_ranking_loss torch.meshgrid torch.moveaxis torch.movedim torch.nanmean
        torch.narrow_copy torch.native_dropout torch.nn.functional.native_channel_shuffle torch.norm_except_dim
        torch.permute_copy torch.poisson_nll_loss torch.renorm torch.rot90 torch.row_stack torch.special.entr
        torch.special.ndtr torch.split_with_sizes_copy torch.squeeze_copy torch.swapaxes torch.t_copy torch.tile
        torch.transpose_copy torch.trapezoid torch.trapz torch.triplet_margin_loss torch.unbind_copy
        torch.unfold_copy torch.unsafe_chunk torch.unsafe_split torch.unsafe_split_with_sizes
        torch.unsqueeze_copy torch.view_copy torch.vsplit torch.vstack
    """,
    "opened": """
        torch.Tensor.to_dense torch.atleast_1d torch.atleast_2d torch.atleast_3d torch.block_diag
        torch.broadcast_tensors torch.cartesian_prod torch.nn.functional.adaptive_avg_pool2d
        torch.nn.functional.adaptive_avg_pool3d torch.nn.functional.adaptive_max_pool1d_with_indices
        torch.nn.functional.adaptive_max_pool2d_with_indices
        torch.nn.functional.adaptive_max_pool3d_with_indices torch.nn.functional.batch_norm
        torch.nn.functional.binary_cross_entropy torch.nn.functional.binary_cross_entropy_with_logits
        torch.nn.functional.cosine_embedding_loss torch.nn.functional.cross_entropy
        torch.nn.functional.grid_sample torch.nn.functional.group_norm torch.nn.functional.hinge_embedding_loss
        torch.nn.functional.huber_loss torch.nn.functional.instance_norm torch.nn.functional.interpolate
        torch.nn.functional.kl_div torch.nn.functional.l1_loss torch.nn.functional.layer_norm
        torch.nn.functional.linear_cross_entropy torch.nn.functional.local_response_norm
        torch.nn.functional.log_softmax torch.nn.functional.lp_pool1d torch.nn.functional.lp_pool2d
        torch.nn.functional.lp_pool3d torch.nn.functional.margin_ranking_loss
        torch.nn.functional.max_pool2d_with_indices torch.nn.functional.max_pool3d_with_indices
        torch.nn.functional.max_unpool1d torch.nn.functional.max_unpool2d torch.nn.functional.max_unpool3d
        torch.nn.functional.mse_loss torch.nn.functional.multi_margin_loss
        torch.nn.functional.multilabel_margin_loss torch.nn.functional.multilabel_soft_margin_loss
        torch.nn.functional.nll_loss torch.nn.functional.normalize torch.nn.functional.poisson_nll_loss
        torch.nn.functional.rms_norm torch.nn.functional.smooth_l1_loss torch.nn.functional.soft_margin_loss
        torch.nn.functional.softmax torch.nn.functional.softmin torch.nn.functional.tanhshrink
        torch.nn.functional.triplet_margin_loss torch.nn.functional.triplet_margin_with_distance_loss torch.norm
        torch.stft torch.tensordot torch.unravel_index
    """,
    "refused": """
        torch.Tensor.cdouble torch.Tensor.chalf torch.Tensor.to_sparse torch.allclose torch.ctc_loss
        torch.detach_copy torch.equal torch.float_power torch.hash_tensor torch.histogram torch.histogramdd
        torch.igamma torch.igammac torch.linalg.matrix_sqrth torch.linalg.polar torch.lobpcg
        torch.nn.functional.conv_tbc torch.nn.functional.ctc_loss
        torch.nn.functional.fractional_max_pool2d_with_indices
        torch.nn.functional.fractional_max_pool3d_with_indices torch.nn.functional.gaussian_nll_loss
        torch.nn.functional.gumbel_softmax torch.nuclear_norm torch.orgqr torch.pca_lowrank torch.select_copy
        torch.slice_copy torch.special.airy_ai torch.special.bessel_j0 torch.special.bessel_j1
        torch.special.bessel_y0 torch.special.bessel_y1 torch.special.chebyshev_polynomial_u
        torch.special.chebyshev_polynomial_v torch.special.chebyshev_polynomial_w torch.special.gammainc
        torch.special.gammaincc torch.special.hermite_polynomial_h torch.special.hermite_polynomial_he
        torch.special.laguerre_polynomial_l torch.special.legendre_polynomial_p torch.special.modified_bessel_i0
        torch.special.modified_bessel_i1 torch.special.modified_bessel_k0 torch.special.modified_bessel_k1
        torch.special.scaled_modified_bessel_k0 torch.special.scaled_modified_bessel_k1
        torch.special.shifted_chebyshev_polynomial_t torch.special.shifted_chebyshev_polynomial_u
        torch.special.shifted_chebyshev_polynomial_v torch.special.shifted_chebyshev_polynomial_w
        torch.special.spherical_bessel_j0 torch.special.zeta torch.split_copy torch.svd_lowrank
        torch.view_as_complex_copy
    """,
}
