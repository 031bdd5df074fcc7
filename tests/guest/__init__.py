"""Real guests under QEMU: what they boot from, how they are driven, and what they prove about the back-end."""
