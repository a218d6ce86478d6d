// Seeks, plays and pauses control and output together. Its own seek gives an event too, which it ignores.
let seeking = 0;
for (const kind of ["loadeddata", "seeked", "play", "pause"])
    document.addEventListener(kind, ({target}) => {
        const pair = [...document.querySelectorAll("#control video, #output video")];
        const other = pair[1 - pair.indexOf(target)];
        if (pair.length < 2 || !pair.includes(target) || performance.now() - seeking < 300) return;
        if (kind == "pause" && !target.ended) other.pause();
        else if (kind == "play" && other.paused) other.play();
        if (kind != "play" && Math.abs(other.currentTime - target.currentTime) > 0.05) {
            seeking = performance.now();
            other.currentTime = target.currentTime;
        }
    }, true);  // media events do not bubble
