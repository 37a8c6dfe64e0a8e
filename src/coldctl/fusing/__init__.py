"""From folders of contributions to one fused body. Never imports torch."""
