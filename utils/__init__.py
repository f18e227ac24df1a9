"""What training needs around the methods: loop, runs, checkpoints, records, pictures, devices."""
