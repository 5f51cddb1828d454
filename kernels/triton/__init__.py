"""Triton kernels and their launchers, importable as `longattn.kernels`: one file per stem, nothing imported here."""
