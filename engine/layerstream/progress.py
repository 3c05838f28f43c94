"""placeholder"""
def make_listener(progress):
    return progress if callable(progress) else None
