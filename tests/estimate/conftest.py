from tests.models.conftest import folders, offline, videos

__all__ = ["folders", "offline", "videos"]
