"""One suite for all methods: what each claims, and what all of them must do."""
