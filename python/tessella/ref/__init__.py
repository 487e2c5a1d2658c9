"""Reference implementations: slow, obvious torch that every kernel is compared with.

They also stand in for a kernel that this build does not have. They import nothing but the
formats and the independent layout.
"""
