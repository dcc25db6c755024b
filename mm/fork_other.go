//go:build !amd64

package mm

import "golang.org/x/sys/unix"

const forkReportLen = 16

func forkReported([forkReportLen]byte) error { return unix.ENOTSUP }

// forkAlone makes no child here: what that runs is written for amd64 only.
func forkAlone(mappings, int) (pid, pidfd int, err error) { return 0, -1, unix.ENOTSUP }
