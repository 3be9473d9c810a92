"""Files that are broken in every usual way, and strange ones that can be read."""

from __future__ import annotations

import os

from video_files import lay_down, lie_about_duration, write_sound, write_video


def unreadable(folder):
    """Files of which no clip can be had: name -> a part of the reason."""
    (folder / "zero bytes.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    whole = write_video(folder / "whole.mp4", 20, codec="libx264")
    (folder / "truncated.mp4").write_bytes((folder / "whole.mp4").read_bytes()[:4000])
    os.remove(whole)
    write_sound(folder / "sound only.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "gone.mp4")
    reasons = {
        "zero bytes.mp4": "the file is empty",
        "text.mp4": "Invalid data",
        "truncated.mp4": "Invalid data",
        "sound only.mp4": "no video stream",
        "dangling.mp4": "No such file",
    }
    if os.getuid() != 0:  # root may read everything
        os.chmod(write_video(folder / "forbidden.mp4", 20, codec="libx264"), 0)
        reasons["forbidden.mp4"] = "Permission denied"
    return reasons


def odd(folder):
    """Files that are strange and yet to be read: name -> (height, width) that their frames come out with."""
    write_video(folder / "one frame.mp4", 1, codec="libx264")
    lie_about_duration(write_video(folder / "long by its header.mp4", 20, codec="libx264"), 50)
    lay_down(write_video(folder / "rotated.mp4", 20, codec="libx264"))
    write_video(folder / "odd size.avi", 20, size=(61, 47))
    write_video(folder / "Größe 動画 🎬.mp4", 20, codec="libx264")
    end = write_video(folder / "cut off.avi", 20)
    (folder / "cut off.avi").write_bytes((folder / "cut off.avi").read_bytes()[: os.path.getsize(end) // 2])
    sizes = dict.fromkeys(("one frame.mp4", "long by its header.mp4", "Größe 動画 🎬.mp4", "cut off.avi"), (48, 64))
    return {**sizes, "rotated.mp4": (64, 48), "odd size.avi": (47, 61)}
