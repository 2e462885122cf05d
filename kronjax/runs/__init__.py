"""Many matrices solved in one resumable run, on all devices and hosts."""
