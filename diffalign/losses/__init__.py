"""Losses over likelihood ratios: functions of tensors, unreduced, torch only."""
