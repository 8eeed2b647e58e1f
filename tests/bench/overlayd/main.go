// overlayd compares snapshotters behind containerd's proxy.
//
//	overlayd serve ROOT SOCKET                    containerd's own overlayfs snapshotter, served as a proxy plugin is
//	overlayd load SOCKET OTHERS CLIENTS CALLS     calls one, and prints JSON {operation: {"ms": [each call], "seconds": all}}
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

func serve(root, socket string) error {
	// As containerd's own configuration has it by default.
	snapshotter, err := overlay.NewSnapshotter(root, overlay.AsynchronousRemove)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	return server.Serve(listener)
}

func runLoad(socket string, counts []string) error {
	var numbers [3]int
	for n := range numbers {
		value, err := strconv.Atoi(counts[n])
		if err != nil {
			return err
		}
		numbers[n] = value
	}
	return json.NewEncoder(os.Stdout).Encode(measure(socket, numbers[0], numbers[1], numbers[2]))
}

func main() {
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(os.Args[2], os.Args[3])
	case "load":
		err = runLoad(os.Args[2], os.Args[3:])
	default:
		err = fmt.Errorf("no such command: %s", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overlayd:", err)
		os.Exit(1)
	}
}
