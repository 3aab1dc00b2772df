"""What goes where, decided and checked before any forward pass."""
