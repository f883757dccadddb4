"""The demo: a tiny teacher that sorts digits, a student that cannot yet, and three trainings side by side."""
