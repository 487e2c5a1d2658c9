"""What tests and benches share: cases, tolerances, poison, and forcing a kernel."""
