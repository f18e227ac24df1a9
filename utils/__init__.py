"""What training needs around the methods: loop, checkpoints, records, runtime."""
