// Package conformance runs containerd's own snapshotter test suite on a snapshotter that serves a unix socket.
package conformance

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Each case gets a connection and a plugin name of its own: the service keeps state apart per name.
var plugins atomic.Int32

func connect(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	address := "unix://" + os.Getenv("SNAPSHOTTER_ADDRESS")
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	plugin := fmt.Sprintf("%s-%d", os.Getenv("SNAPSHOTTER_NAME"), plugins.Add(1))
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), plugin), connection.Close, nil
}

// The suite spares snapshotters of this name the renaming of lower directories, which no overlay can do.
func TestSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", connect)
}
