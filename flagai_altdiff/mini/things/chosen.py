"""Which things there are: code points of emoji that the eye can tell apart, and that people ask for by name."""

from __future__ import annotations

THINGS: dict[str, tuple[str, ...]] = {
    "animals": tuple(
        """
        1f648 1f412 1f98d 1f415 1f429 1f43a 1f98a 1f99d 1f408 1f408-200d-2b1b 1f981 1f405 1f406 1facf 1f40e
        1f984 1f993 1f98c 1f404 1f416 1f40f 1f42a 1f999 1f992 1f418 1f9a3 1f98f 1f99b 1f401 1f400 1f439 1f407
        1f9ab 1f994 1f987 1f43b 1f43b-200d-2744 1f428 1f43c 1f9a5 1f9a6 1f998 1f43e 1f983 1f414 1f413 1f424
        1f426 1f427 1f985 1f986 1f9a2 1f989 1fab6 1f9a9 1f99a 1f99c 1fabf 1f438 1f40a 1f422 1f98e 1f40d 1f409
        1f995 1f996 1f40b 1f42c 1f41f 1f420 1f421 1f988 1f419 1f41a 1fab8 1fabc 1f980 1f99e 1f990 1f991 1f40c
        1f98b 1f41b 1f41c 1f41d 1fab2 1f41e 1f577 1f578 1f982 1f99f 1fab0
        """.split()
    ),
    "plants": tuple(
        """
        1f490 1f338 1fab7 1f339 1f33a 1f33b 1f337 1f331 1fab4 1f332 1f333 1f334 1f335 2618 1f340 1f341 1f342
        1faba 1f344
        """.split()
    ),
    "food": tuple(
        """
        1f347 1f348 1f349 1f34a 1f34b 1f34c 1f34d 1f96d 1f34e 1f34f 1f350 1f351 1f352 1f353 1fad0 1f95d 1f345
        1fad2 1f965 1f951 1f346 1f954 1f955 1f33d 1f336 1fad1 1f952 1f96c 1f966 1f9c4 1f9c5 1f95c 1fad8 1f330
        1fada 1fadb 1f35e 1f950 1f956 1f968 1f96f 1f95e 1f9c7 1f9c0 1f356 1f357 1f953 1f354 1f35f 1f355 1f32d
        1f96a 1f32e 1f32f 1f95a 1f373 1f957 1f37f 1f9c8 1f9c2 1f371 1f359 1f35b 1f35d 1f360 1f363 1f364 1f95f
        1f960 1f961 1f366 1f368 1f369 1f36a 1f382 1f370 1f9c1 1f967 1f36b 1f36c 1f36d 1f36f 1f37c 1f95b 2615
        1fad6 1f375 1f37e 1f377 1f378 1f379 1f37a 1f37b 1f9cb 1f9ca 1f962 1f37d 1f944 1f52a 1f3fa
        """.split()
    ),
    "travel": tuple(
        """
        1f30d 1f310 1f5fa 1f5fe 1f9ed 1f3d4 26f0 1f30b 1f3dd 1f9f1 1faa8 1fab5 1f6d6 1f3e2 1f3e5 1f3eb 1f3ed
        1f3ef 1f3f0 1f5fd 26ea 1f54c 26f2 26fa 1f3a0 1f6dd 1f3a1 1f3a2 1f3aa 1f682 1f685 1f686 1f687 1f68a 1f69d
        1f68c 1f691 1f692 1f693 1f695 1f697 1f699 1f6fb 1f69a 1f69b 1f69c 1f3ce 1f3cd 1f6f5 1f6b2 1f6f4 1f6f9
        1f6fc 1f6e4 1f6e2 26fd 1f6de 1f6a6 2693 1f6df 26f5 1f6f6 1f6a4 1f6f3 26f4 1f6e5 1f6a2 2708 1f6e9 1fa82
        1f681 1f6f0 1f680 1f6f8 1f6ce 1f9f3
        """.split()
    ),
    "weather": tuple(
        """
        231b 231a 23f0 23f1 23f2 1f570 1f315 1f321 2600 1fa90 1f320 2601 26c5 1f327 1f328 1f32a 1f32b 1f308
        1f302 2602 26a1 2744 2603 1f525 1f4a7 1f30a
        """.split()
    ),
    "activities": tuple(
        """
        1f383 1f384 1f386 1f9e8 2728 1f388 1f389 1f390 1f9e7 1f380 1f381 1f3ab 1f396 1f3c6 1f3c5 1f947 26bd 26be
        1f94e 1f3c0 1f3d0 1f3c8 1f3c9 1f3be 1f94f 1f3b3 1f3d2 1f3d3 1f3f8 1f94a 26f8 1f3a3 1f93f 1f3bf 1f6f7
        1f3af 1fa80 1fa81 1f3b1 1f52e 1fa84 1f3ae 1f579 1f3b2 1f9e9 1f9f8 1fa85 1faa9 265f 1f5bc 1f3a8 1f9f5
        1faa1 1f9f6
        """.split()
    ),
    "objects": tuple(
        """
        1f453 1f576 1f97d 1f454 1f455 1f456 1f9e3 1f9e4 1f9e5 1f9e6 1f457 1f458 1fa73 1faad 1f45b 1f45c 1f6cd
        1f392 1f45e 1f45f 1f97e 1f460 1fa70 1f451 1f452 1f3a9 1f393 1fa96 1f484 1f48e 1f50a 1f4e2 1f4e3 1f514
        1f3bc 1f399 1f3a4 1f3a7 1f4fb 1f3b7 1f3ba 1fa97 1f3b8 1f3b9 1f3bb 1fa95 1f941 1fa87 1fa88 1f4f1 260e
        1f4de 1f50b 1f50c 1f4bb 1f5a5 1f5a8 2328 1f5b1 1f4be 1f9ee 1f3a5 1f3ac 1f4fa 1f4f7 1f4f9 1f50d 1f56f
        1f4a1 1f526 1f3ee 1fa94 1f4d4 1f4d5 1f4d6 1f4da 1f4dc 1f4f0 1f5de 1f516 1fa99 1f4b0 1f4b5 1f4b8 1f4b3
        1f9fe 2709 1f4e6 1f4eb 1f4ee 270f 1f58a 1f58c 1f58d 1f4bc 1f4c1 1f4c5 1f4ce 1f4cf 2702 1f5d1 1f512 1f511
        1f5dd 1f528 1fa93 26cf 1f5e1 2694 1f4a3 1fa83 1f3f9 1f6e1 1fa9a 1f527 1fa9b 1f529 2699 2696 1fa9d 1f9f0
        1f9f2 1fa9c 1f9ea 1f9ec 1f52c 1f52d 1f4e1 1f489 1f48a 1fa7a 1f6aa 1fa9e 1fa9f 1f6cf 1f6cb 1fa91 1f6bd
        1f6bf 1f6c1 1fa92 1f9f9 1f9fa 1faa3 1f9fc 1fae7 1faa5 1f9ef 1f6d2 1f5ff
        """.split()
    ),
    "people": tuple(
        """
        1f921 1f47b 1f47d 1f916 1f498 1f496 1f494 2764-200d-1f525 1f4aa 1f9e0 1f9b7 1f9b4 1f440 1f444
        """.split()
    ),
}
"""Group -> things; several code points of one are joined by ``-``."""
