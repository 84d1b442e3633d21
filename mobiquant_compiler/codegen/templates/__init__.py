"""Kernel templates, one family a file; every upper-case constexpr parameter is an axis of specialisation."""
